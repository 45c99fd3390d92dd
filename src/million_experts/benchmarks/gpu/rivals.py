"""What the layer is timed beside: other ways to compute it, and what stands in its place.

Shapes: T tokens, D model width, H heads, k experts per head, K = H*k, N experts, d numbers per sub-key.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from million_experts.benchmarks.gpu import costs
from million_experts.benchmarks.gpu.costs import Cost, Shape
from million_experts.benchmarks.gpu.right_layer import new_layer
from million_experts.layers import PEER, DenseFeedForward, ProductKeyRetrieval
from million_experts.optim import RowwiseAdamW

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# A rate so small that hundreds of steps on random gradients leave sound weights.
RATE = 1e-5

#: What ours runs on, and the retrieval of the product-key memory.
BACKEND = "triton"
OURS_DENSE = "PEER, dense gradients, AdamW"
OURS_SPARSE = "PEER, sparse gradients, RowwiseAdamW"
GATHERS = "gathers and einsum"
COMPILED = "gathers and einsum, compiled"
OURS = (OURS_DENSE, OURS_SPARSE)


@dataclass(frozen=True)
class Rival:
    """A layer by name: how it is built for a shape and a device, what trains it, what it must move.

    Attributes:
        build: may take the parameters of what was built before, by name, from `shared`.
        cost: of a phase, for a shape and how many experts are used.
        moved: what the plan expects it to move; None for `cost`.
    """

    name: str
    build: Callable[[Shape, torch.device, dict[str, nn.Module]], nn.Module]
    optimizer: Optimizer
    cost: Callable[[Shape, str, float | None], Cost]
    moved: Callable[[Shape, str], Cost] | None = None


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    return torch.optim.AdamW(parameters, lr=RATE, fused=parameters[0].device.type == "cuda" or None)


def _rowwise(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    narrow = torch.bfloat16 if parameters[0].dtype == torch.bfloat16 else None
    return RowwiseAdamW(parameters, lr=RATE, second_moment="row", momentum_dtype=narrow)


def _peer(sparse: bool) -> Callable[[Shape, torch.device, dict[str, nn.Module]], PEER]:
    def build(shape: Shape, device: torch.device, shared: dict[str, nn.Module]) -> PEER:
        """A layer that has its table in common with the others: of a large pool there is room for one."""
        first = shared.get("table")
        layer = new_layer(
            device, getattr(torch, shape.dtype), first.experts if isinstance(first, PEER) else None,
            dim=shape.D, num_experts=(shape.n, shape.n), num_heads=shape.H, experts_per_head=shape.k,
            key_dim=2 * shape.d, glu=shape.R == 3, sparse_grad=sparse, backend=BACKEND,
        )  # fmt: skip
        shared.setdefault("table", layer)
        return layer

    return build


class Gathers(nn.Module):
    """A PEER layer as plain PyTorch has it, as in PEER-pytorch: embeddings looked up, then einsum."""

    def __init__(self, layer: PEER):
        super().__init__()
        self.query_proj, self.query_norm = layer.query_proj, nn.BatchNorm1d(layer.query_proj.out_features)
        self.keys1, self.keys2, self.experts = layer.keys1, layer.keys2, layer.experts
        self.heads, self.k, self.n2 = layer.num_heads, layer.experts_per_head, layer.codebook_sizes[1]

    def forward(self, x_TD: Tensor) -> Tensor:
        k = self.k
        query = self.query_norm(self.query_proj(x_TD)).view(len(x_TD), self.heads, 2, -1)
        scores1, i = torch.einsum("thd,nd->thn", query[:, :, 0], self.keys1).topk(k)
        scores2, j = torch.einsum("thd,nd->thn", query[:, :, 1], self.keys2).topk(k)
        scores, best = (scores1.unsqueeze(-1) + scores2.unsqueeze(-2)).flatten(-2).topk(k)
        indices_TK = (i.gather(-1, best // k) * self.n2 + j.gather(-1, best % k)).flatten(1)
        gates_TK = scores.softmax(-1).flatten(1)
        rows = F.embedding(indices_TK, self.experts.flatten(1))
        down, up, *gate = rows.unflatten(-1, (-1, x_TD.shape[1])).unbind(2)
        hidden_TK = F.gelu(torch.einsum("td,tkd->tk", x_TD, down))
        if gate:
            hidden_TK = hidden_TK * torch.einsum("td,tkd->tk", x_TD, gate[0])
        return torch.einsum("tk,tkd->td", gates_TK * hidden_TK, up)


def _gathers(compiled: bool) -> Callable[..., nn.Module]:
    def build(shape: Shape, device: torch.device, shared: dict[str, nn.Module]) -> nn.Module:
        module = Gathers(_peer(False)(shape, device, shared)).to(device, getattr(torch, shape.dtype))
        if compiled:
            torch._dynamo.reset()
            module.compile(dynamic=False)
        return module

    return build


def _dense(width: Callable[[Shape], int]) -> Callable[..., nn.Module]:
    def build(shape: Shape, device: torch.device, shared: dict[str, nn.Module]) -> nn.Module:
        with torch.device(device):
            return DenseFeedForward(shape.D, width(shape)).to(getattr(torch, shape.dtype))

    return build


class GroupedMixture(nn.Module):
    """Two of eight experts per token: tokens sorted by expert, a grouped product for each kind of matrix."""

    def __init__(self, dim: int, width: int, experts: int = 8, active: int = 2):
        super().__init__()
        self.router, self.active = nn.Linear(dim, experts, bias=False), active
        self.down = nn.Parameter(torch.randn(experts, dim, width) * dim**-0.5)
        self.up = nn.Parameter(torch.randn(experts, width, dim) * width**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        best, chosen = self.router(x_TD).float().topk(self.active)
        experts_P, order_P = chosen.flatten().sort(stable=True)
        each = torch.arange(len(self.down), device=x_TD.device)
        ends = torch.searchsorted(experts_P, each, right=True).to(torch.int32)
        tokens_P = order_P // self.active
        hidden = F.gelu(_grouped(x_TD[tokens_P], self.down, ends))
        out_PD = _grouped(hidden, self.up, ends)
        gates_P = best.softmax(-1).flatten()[order_P, None].to(out_PD.dtype)
        return out_PD.new_zeros(x_TD.shape).index_add(0, tokens_P, out_PD * gates_P)


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[0] times weights[0], up to ends[1] times weights[1] ..."""
    product: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    if torch.is_autocast_enabled(rows.device.type):  # which does not know of it
        narrow = torch.get_autocast_dtype(rows.device.type)
        rows, weights = rows.to(narrow), weights.to(narrow)
    return product(rows, weights, offs=ends)


def _mixture(shape: Shape, device: torch.device, shared: dict[str, nn.Module]) -> nn.Module:
    with torch.device(device):
        return GroupedMixture(shape.D, 2 * shape.D).to(getattr(torch, shape.dtype))


class Memory(ProductKeyRetrieval):
    """A product-key memory (arXiv 1907.05242): values of experts' size, summed by `nn.EmbeddingBag`."""

    def __init__(self, shape: Shape):
        super().__init__(
            shape.D, (shape.n, shape.n), shape.H, shape.k, 2 * shape.d, "batch", True, "softmax", BACKEND
        )
        self.values = nn.EmbeddingBag(shape.N, shape.D, mode="sum")

    @property
    def table(self) -> nn.Parameter:
        weight = self.values.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.retrieve(x_TD)
        gates = routing.gates.flatten(1).to(self.table.dtype)
        return self.values(routing.indices.flatten(1), per_sample_weights=gates).to(x_TD.dtype)


def _memory(shape: Shape, device: torch.device, shared: dict[str, nn.Module]) -> nn.Module:
    with torch.device("meta"):
        memory = Memory(shape).to(getattr(torch, shape.dtype))
    memory.to_empty(device=device)
    memory.reset_retrieval()
    nn.init.normal_(memory.table, std=shape.D**-0.5)
    return memory


def _peer_cost(sparse: bool) -> Callable[[Shape, str, float | None], Cost]:
    return lambda shape, phase, distinct: costs.layer(shape, phase, sparse, distinct)


def _memory_cost(shape: Shape, phase: str, distinct: float | None) -> Cost:
    """A row less than an expert has, to be read and to be learned."""
    return costs.layer(replace(shape, R=1), phase, False, distinct)


def _dense_cost(width: Callable[[Shape], int], copies: int = 1) -> Callable[[Shape, str, float | None], Cost]:
    return lambda s, phase, _: costs.feed_forward(s.T, s.D, width(s), phase, s.size, copies)


def _active(shape: Shape) -> int:
    return shape.K


def _wide(shape: Shape) -> int:
    return 4 * shape.D


RIVALS = {
    rival.name: rival
    for rival in (
        Rival(OURS_DENSE, _peer(False), _adamw, _peer_cost(False)),
        Rival(OURS_SPARSE, _peer(True), _rowwise, _peer_cost(True)),
        Rival(GATHERS, _gathers(False), _adamw, _peer_cost(False), costs.gathers),
        Rival(COMPILED, _gathers(True), _adamw, _peer_cost(False), costs.gathers),
        Rival("dense, K neurons", _dense(_active), _adamw, _dense_cost(_active)),
        Rival("dense, 4 * D neurons", _dense(_wide), _adamw, _dense_cost(_wide)),
        Rival("grouped mixture, 2 of 8", _mixture, _adamw, _dense_cost(_wide, 4)),
        Rival("product-key memory", _memory, _adamw, _memory_cost),
    )
}
