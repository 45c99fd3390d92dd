"""Every kind of decoder as several ranks train it; a module of its own, so that new processes find it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from million_experts.distributed import (
    exchange_row_gradients,
    synchronise_query_norm,
    take_tables_from_ddp,
)
from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.optim import RowwiseAdamW, clip_grad_norm_, parameter_groups

RETRIEVAL = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "peer": RETRIEVAL,
    "moe": {"num_experts": 4},
    "expert_choice": {"num_experts": 4},
    "pkm": RETRIEVAL,
    "memory_plus": RETRIEVAL,
}


def decoder(kind: str, seed: int = 0, **options: Any) -> PeerForCausalLM:
    torch.manual_seed(seed)
    config = PeerConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_layer_types=kind,
        **{kind: KINDS[kind] | options},
    )  # fmt: skip
    return PeerForCausalLM(config)


def text(rank: int, padding: bool = False) -> dict[str, Tensor]:
    """A batch of a rank's own with 14 labels; nothing but padding if `padding`."""
    ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(rank))
    real = torch.zeros_like(ids) if padding else torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": real, "labels": torch.where(real.bool(), ids, -100)}


def shared_table(rank: int, world: int, one_process: bool = False) -> dict[str, Tensor | str]:
    """Two steps of a decoder whose blocks share a table with sparse gradients."""
    found: dict[str, Tensor | str] = {}
    model = decoder("memory_plus", seed=0 if one_process else rank, sparse_grad=True)
    wrapped: nn.Module = model
    if not one_process:
        forgotten = DistributedDataParallel(decoder("memory_plus", sparse_grad=True))
        try:
            forgotten(**text(rank))
        except ValueError as error:
            found["forgotten"] = str(error)
        assert take_tables_from_ddp(model) == 1
        wrapped = DistributedDataParallel(model)
    optimizer = RowwiseAdamW(parameter_groups(model, 0.01, 0.05, 0.1, 0.1))
    for _ in range(2):
        for batch in map(text, range(world)) if one_process else [text(rank)]:
            (wrapped(**batch).loss / (world if one_process else 1)).backward()
        if not one_process:
            exchange_row_gradients(wrapped)
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    return found | {name: p.detach().clone() for name, p in model.named_parameters()}


def padding_alone(rank: int, world: int) -> dict[str, dict[str, list[Tensor]]]:
    """Gradients of each kind of decoder, where rank 1 has nothing but padding, and what they should be."""
    found = {}
    for kind in KINDS:
        model = decoder(kind)
        alone = copy.deepcopy(model)  # on the tokens that there are, in one process
        (alone(**text(0), num_items_in_batch=14).loss / world).backward()
        synchronise_query_norm(model)
        wrapped = DistributedDataParallel(model)
        for _ in range(2):  # what DDP did not get in one pass it misses in the next
            model.zero_grad()
            wrapped(**text(rank, padding=rank == 1), num_items_in_batch=14).loss.backward()
        found[kind] = {
            name: [p.grad, expected.grad]
            for (name, p), expected in zip(model.named_parameters(), alone.parameters(), strict=True)
            if p.grad is not None and expected.grad is not None
        }
        assert len(found[kind]) == len(list(model.parameters())), kind
    return found


def sharded(rank: int, world: int) -> dict[str, list[float] | str]:
    """Losses of three steps by `fully_shard`, or why not; every rank has the same tokens."""
    mesh = init_device_mesh("cpu", (world,))

    def losses(model: PeerForCausalLM, *groups: Any) -> list[float] | str:
        try:
            for group in groups:
                fully_shard(group, mesh=mesh)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            found = []
            for _ in range(3):
                loss = model(**text(0)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(float(loss))
            return found
        except (ValueError, NotImplementedError) as error:
            return str(error)

    found = {}
    for kind in KINDS:
        found[f"{kind} in one process"] = losses(decoder(kind))
        model = decoder(kind)
        found[f"{kind} by blocks"] = losses(model, *model.model.layers, model)
    for kind in ("peer", "pkm"):
        model = decoder(kind, sparse_grad=True)
        found[f"{kind} with sparse gradients"] = losses(model, *model.model.layers, model)
    model = decoder("memory_plus")
    memories = [block.mlp for block in model.model.layers]
    found["memory_plus with its memories together"] = losses(model, memories, *model.model.layers, model)
    return found


def jobs(rank: int, world: int) -> dict[str, Any]:
    """All of the above: to start processes takes longer."""
    return {job.__name__: job(rank, world) for job in (shared_table, padding_alone, sharded)}
