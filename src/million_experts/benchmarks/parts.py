"""Builders of the competitors that are parts of a layer: the experts alone, and probes of the memory's speed.

Shapes: T tokens, D model width, K experts a token, N experts in the pool.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from million_experts.benchmarks.peers import Shared
from million_experts.benchmarks.workload import Unavailable, Workload, share_key
from million_experts.ops import expert_mlp

PICKS = ("uniform", "zipf")


class Experts(nn.Module):
    """A table of experts, and the operation that applies them."""

    def __init__(self, num_experts: int, dim: int, dtype: torch.dtype):
        super().__init__()
        self.experts = nn.Parameter(torch.empty(num_experts, 2, dim, dtype=dtype))
        nn.init.normal_(self.experts, std=dim**-0.5)
        self.backend = "auto"

    def forward(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return expert_mlp(x_TD, indices_TK, gates_TK, self.experts, backend=self.backend)


class RowProbe(nn.Module):
    """Reads the rows that the experts would read, an expert's rows together, and does little with them."""

    def __init__(self, experts: nn.Parameter, read: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.experts, self.read = experts, read

    def forward(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return self.read(self.experts.flatten(1), indices_TK)


def draw_picks(
    tokens: int, dim: int, num_experts: int, K: int, picks: str
) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Draws tokens [T, D], picked experts [T, K] and gates [T, K].

    "zipf" picks the expert of rank r with a probability of log(1 + 1/r) / log(N + 1), about 1/r: as uneven
    as words in a text. The ranks are dealt to the experts at random, so that popular ones are no neighbours.
    """
    if picks == "zipf":
        dealt = torch.randperm(num_experts, generator=torch.Generator().manual_seed(0), device="cpu")

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(tokens, dim, generator=generator)
        if picks == "uniform":
            indices = torch.randint(num_experts, (tokens, K), generator=generator)
        else:
            u = torch.rand(tokens, K, generator=generator, dtype=torch.float64)
            ranks = ((num_experts + 1) ** u).long() - 1
            indices = dealt[ranks.clamp_(0, num_experts - 1)]
        gates = torch.rand(tokens, K, generator=generator) / K
        return x, indices, gates

    return draw


def experts(
    shared: Shared,
    *,
    tokens: int,
    dim: int,
    num_experts: int,
    K: int,
    picks: str = "uniform",
    dtype: str = "float32",
    backend: str = "auto",
) -> Workload:
    """`expert_mlp` with given picks."""
    table = _shared_table(shared, num_experts=num_experts, dim=dim, dtype=dtype)
    module = Experts(1, dim, getattr(torch, dtype))
    module.experts, module.backend = table, backend
    return Workload(module, draw_picks(tokens, dim, num_experts, K, picks))


def row_probe(
    shared: Shared,
    *,
    how: str,
    tokens: int,
    dim: int,
    num_experts: int,
    K: int,
    picks: str = "uniform",
    dtype: str = "float32",
) -> Workload:
    """A probe of how fast rows of an expert's size can be read at random; `how` names one of several."""
    if how == "kernel":
        read = _kernel_read()
    elif how == "index_select":
        kept: list[Tensor] = []  # fresh memory for the copy would cost more than the rows

        def read(table: Tensor, rows_TK: Tensor) -> Tensor:
            if not kept:
                kept.append(table.new_empty(rows_TK.numel(), table.shape[1]))
            return torch.index_select(table, 0, rows_TK.flatten(), out=kept[0])
    else:

        def read(table: Tensor, rows_TK: Tensor) -> Tensor:
            return F.embedding_bag(rows_TK, table, mode="sum")

    table = _shared_table(shared, num_experts=num_experts, dim=dim, dtype=dtype)
    draw = draw_picks(tokens, dim, num_experts, K, picks)
    return Workload(RowProbe(table, read), draw, like_tokens=False)


def _kernel_read() -> Callable[[Tensor, Tensor], Tensor]:
    try:
        kernel = importlib.import_module("million_experts.ops.cpu").random_row_read
    except ImportError as error:
        raise Unavailable(f"the C++ kernels do not run here ({error})") from error

    def read(table: Tensor, rows_TK: Tensor) -> Tensor:
        return torch.tensor(float(kernel(table.detach(), rows_TK.flatten())))

    return read


def _shared_table(shared: Shared, **shape: Any) -> nn.Parameter:
    key = share_key("experts", shape)
    if key not in shared:
        shared[key] = Experts(shape["num_experts"], shape["dim"], getattr(torch, shape["dtype"]))
    return shared[key].experts  # type: ignore[return-value]
