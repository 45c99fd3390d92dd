"""What each of several processes runs for the tests; a module of its own, so that new processes find it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from million_experts import PEER
from million_experts.distributed import (
    exchange_row_gradients,
    synchronise_query_norm,
    take_tables_from_ddp,
)
from million_experts.layers import MaskedBatchNorm
from million_experts.optim import RowwiseAdamW, clip_grad_norm_, parameter_groups

N, D = 64, 8


Job = Callable[[int, int], Any]


def run(job: Job, world: int, folder: Path) -> list[Any]:
    """What job(rank, world) returned on each of `world` ranks, which find it by its module."""
    results = folder / "results"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(start, (world, port, str(results), job), nprocs=world)
    return [torch.load(f"{results}.{rank}") for rank in range(world)]


def start(rank: int, world: int, port: int, results: str, job: Job) -> None:
    """Runs a job as one of the ranks; what it returns goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(job(rank, world), f"{results}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def row_gradient(rank: int, case: str) -> Tensor | None:
    """What a rank brings: rows in any order, some of them twice, some of other ranks too."""
    if case == "nobody" or (case == "one without gradient" and rank == 1):
        return None
    generator = torch.Generator().manual_seed(rank)
    count = 0 if case == "one without rows" and rank == 0 else 40 + 7 * rank
    rows = torch.randint(N, (count,), generator=generator)
    return torch.sparse_coo_tensor(
        rows[None], torch.randn(count, 2, D, generator=generator), (N, 2, D), check_invariants=False
    )


EXCHANGES = ("all", "one without rows", "one without gradient", "nobody")


def exchange(rank: int, world: int) -> dict[str, Tensor | str | None]:
    found: dict[str, Tensor | str | None] = {}
    layer = PEER(D, N, 1, 2, 4, sparse_grad=True)
    for case in EXCHANGES:
        layer.experts.grad = row_gradient(rank, case)
        exchange_row_gradients(layer)
        found[case] = layer.experts.grad
    layer.experts.grad = torch.zeros_like(layer.experts)
    try:
        exchange_row_gradients(nn.Sequential(layer))
    except ValueError as error:
        found["error"] = str(error)
    return found


def tokens(world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, masks and output gradients of all ranks; in the third batch rank 1 has no real token."""
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(4, world * 6, D, generator=generator) for _ in range(2))
    mask = torch.rand(4, world * 6, generator=generator) < 0.7
    mask[2, 6:12] = False
    return x, mask, dy


def norm(rank: int, world: int, one_process: bool = False) -> dict[str, Tensor | str]:
    """Query norm alone; `one_process` runs all ranks' tokens here."""
    module = MaskedBatchNorm(D)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    own = slice(None) if one_process else slice(6 * rank, 6 * rank + 6)
    if not one_process:
        assert synchronise_query_norm(module) == 1
    x, mask, dy = tokens(world)
    found: dict[str, Tensor | str] = {}
    for batch in range(len(x)):
        inputs = (50 + 3 * x[batch, own]).requires_grad_()
        real = mask[batch, own]
        y = module(inputs, real)
        (y * dy[batch, own] * real[:, None]).sum().backward()
        assert inputs.grad is not None
        found |= {f"y {batch}": y.detach()[real], f"dx {batch}": inputs.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
    found |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    if not one_process:
        try:
            module(x[0, own], torch.arange(6) == 6 + rank)  # no real token anywhere
        except ValueError as error:
            found["error"] = str(error)
    return found


def padding(rank: int, world: int) -> dict[str, Tensor]:
    """A step of DistributedDataParallel with a rank of padding alone, its norm synchronised or not."""
    found: dict[str, Tensor] = {}
    for synchronised in (False, True):
        torch.manual_seed(0)
        layer = PEER(D, N, 2, 4, 4)
        if synchronised:
            synchronise_query_norm(layer)
        model = DistributedDataParallel(layer, broadcast_buffers=False)
        x, mask, dy = tokens(world)
        x[2, 6:12] = float("nan")  # what masked tokens hold does not matter
        own = slice(6 * rank, 6 * rank + 6)
        (model(x[2, own], mask[2, own]) * dy[2, own]).sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            found[f"{synchronised} {name}"] = parameter.grad
        found |= {f"{synchronised} {name}": buffer.clone() for name, buffer in layer.named_buffers()}
    return found


def train(rank: int, world: int, one_process: bool = False) -> dict[str, Tensor]:
    """Steps of two micro-batches, clipped, for query BatchNorm; all ranks' tokens here if `one_process`."""
    torch.manual_seed(0 if one_process else rank)  # rank 0's weights have to come to the others
    layer = PEER(D, N, 2, 4, 4, sparse_grad=True)
    model: nn.Module = layer
    if not one_process:
        assert take_tables_from_ddp(layer) == 1
        assert synchronise_query_norm(layer) == 1
        model = DistributedDataParallel(layer)
    optimizer = RowwiseAdamW(parameter_groups(layer, 0.01, 0.05, 0.1, 0.1))
    own = slice(None) if one_process else slice(6 * rank, 6 * rank + 6)
    x, mask, dy = tokens(world)
    norms = []
    for step in (0, 2):
        for batch in (step, step + 1):
            y = model(x[batch, own], mask[batch, own])
            # DDP takes the mean over ranks of gradients that add up here.
            (y * dy[batch, own]).sum().div(world if one_process else 1).backward()
        if not one_process:
            exchange_row_gradients(model)
        norms.append(clip_grad_norm_(layer.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    found = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    return found | {"norms": torch.stack(norms)}
