"""Builders of the competitors that are whole layers: PEER here and elsewhere, and what it replaces.

Shapes: T tokens, D model width, H heads, k experts a head, K = H*k, N = n1*n2 experts.
"""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from million_experts.benchmarks.workload import Unavailable, Workload, share_key
from million_experts.layers import PEER, ProductKeyRetrieval
from million_experts.ops import product_key_topk
from million_experts.ops.backends import BackendError

Shared = dict[tuple[Any, ...], nn.Module]

# Two float32 sums of some hundred products differ by less than this, relative to 1 + their size.
ROUNDING = 2e-5


def draw_tokens(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Draws normal tokens of a shape."""
    return lambda generator: (torch.randn(*shape, generator=generator),)


def peer(shared: Shared, *, backend: str, tokens: int, **shape: Any) -> Workload:
    """This project's layer on one of its backends."""
    layer = _shared_layer(shared, shape)
    layer.backend = backend

    def ambiguous(inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        return ambiguous_tokens(layer, inputs[0], training)

    return Workload(layer, draw_tokens(tokens, layer.dim), ambiguous=ambiguous)


def compiled_plain_peer(shared: Shared, *, tokens: int, **shape: Any) -> Workload:
    """`torch.compile` of the layer in plain PyTorch.

    The layer's own operations are opaque to the compiler. Written out, it may fuse what it can.
    """
    if not torch._dynamo.is_dynamo_supported():
        raise Unavailable("torch.compile does not support this Python or platform")
    layer = PlainPEER(_shared_layer(shared, shape))
    layer.compile(dynamic=False)  # in place: parameters and mode stay those of the module
    return Workload(layer, draw_tokens(tokens, layer.layer.dim))


def _shared_layer(shared: Shared, shape: dict[str, Any]) -> PEER:
    """A layer of that shape with parameters that all layers of the shape hold, and buffers of its own."""
    key = share_key("PEER", shape)
    if key not in shared:
        try:
            shared[key] = PEER(**shape)
        except BackendError as error:
            raise Unavailable(str(error)) from error
    first = shared[key]
    assert isinstance(first, PEER)
    return copy.deepcopy(first, memo={id(parameter): parameter for parameter in first.parameters()})


class PlainPEER(nn.Module):
    """A PEER layer's arithmetic with plain PyTorch operations that autograd and the compiler see through."""

    def __init__(self, layer: PEER):
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        layer, k = self.layer, self.layer.experts_per_head
        n2 = layer.codebook_sizes[1]
        query = layer._queries(x_TD, None)
        scores1, i = torch.einsum("thd,nd->thn", query[:, :, 0], layer.keys1).topk(k)
        scores2, j = torch.einsum("thd,nd->thn", query[:, :, 1], layer.keys2).topk(k)
        scores, best = (scores1.unsqueeze(-1) + scores2.unsqueeze(-2)).flatten(-2).topk(k)
        indices_TK = (i.gather(-1, best // k) * n2 + j.gather(-1, best % k)).flatten(1)
        gates_TK = scores.softmax(-1).flatten(1)
        down, up, *gate = layer.experts[indices_TK].unbind(2)
        hidden_TK = F.gelu((down * x_TD.unsqueeze(1)).sum(-1))
        if gate:
            hidden_TK = hidden_TK * (gate[0] * x_TD.unsqueeze(1)).sum(-1)
        return ((gates_TK * hidden_TK).unsqueeze(-1) * up).sum(1)


@torch.no_grad()
def ambiguous_tokens(layer: PEER, x_TD: Tensor, training: bool) -> Tensor:
    """[T] True where the k-th and the next best expert of a head score the same up to rounding.

    Which of them is taken depends on the order of summation, and no backend is wrong.
    """
    k = layer.experts_per_head
    if k == min(layer.codebook_sizes):
        return torch.zeros(len(x_TD), dtype=torch.bool)
    # A copy, because BatchNorm in training mode would note the tokens.
    probe = copy.deepcopy(layer, memo={id(parameter): parameter for parameter in layer.parameters()})
    query = probe.train(training)._queries(x_TD, None)
    scores, _ = product_key_topk(query, layer.keys1, layer.keys2, k + 1, "reference")
    gap = scores[..., k - 1] - scores[..., k]
    return (gap <= ROUNDING * (1 + scores[..., k].abs())).any(-1)


def peer_pytorch(
    shared: Shared,
    *,
    tokens: int,
    dim: int,
    num_experts: int,
    num_heads: int,
    experts_per_head: int,
    key_dim: int,
) -> Workload:
    """PEER-pytorch from PyPI, set up as the paper's Algorithm 1 has it.

    Its default, `non_competing_scores=True`, would keep the best expert of each head alone.
    """
    try:
        package = importlib.import_module("PEER_pytorch")
    except ImportError as error:
        raise Unavailable(
            f"PEER-pytorch cannot be imported ({error}): pip install 'million-experts[bench]'"
        ) from error
    layer = package.PEER(
        dim,
        heads=num_heads,
        num_experts=num_experts,
        num_experts_per_head=experts_per_head,
        dim_key=key_dim // 2,  # of each half
        non_competing_scores=False,
        pre_rmsnorm=False,
    )
    return Workload(layer, draw_tokens(1, tokens, dim))


def mixtral(
    shared: Shared, *, tokens: int, dim: int, width: int, experts: int, active: int, implementation: str
) -> Workload:
    """The sparse mixture of experts of transformers' Mixtral, with one of its expert implementations."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error}): pip install transformers") from error
    config = MixtralConfig(
        hidden_size=dim, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=active
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():  # the block leaves them uninitialised
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return Workload(block, draw_tokens(1, tokens, dim))


def dense(shared: Shared, *, tokens: int, dim: int, width: int) -> Workload:
    """The feed-forward that PEER stands in for: two matrices and a GELU."""
    layer = nn.Sequential(nn.Linear(dim, width, bias=False), nn.GELU(), nn.Linear(width, dim, bias=False))
    return Workload(layer, draw_tokens(tokens, dim))


class EmbeddingBagMemory(ProductKeyRetrieval):
    """A product-key memory (arXiv 1907.05242): values in place of neurons, summed by `nn.EmbeddingBag`."""

    def __init__(
        self, dim: int, num_experts: int, num_heads: int, experts_per_head: int, key_dim: int, backend: str
    ):
        super().__init__(
            dim, num_experts, num_heads, experts_per_head, key_dim, "batch", True, "softmax", backend
        )
        self.values = nn.EmbeddingBag(self.num_experts, dim, mode="sum")
        nn.init.normal_(self.values.weight, std=dim**-0.5)
        self.reset_retrieval()

    @property
    def table(self) -> nn.Parameter:
        weight = self.values.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.retrieve(x_TD)
        return self.values(routing.indices.flatten(1), per_sample_weights=routing.gates.flatten(1))


def product_key_memory(shared: Shared, *, tokens: int, dim: int, **shape: Any) -> Workload:
    """A product-key memory with this project's fastest retrieval."""
    return Workload(EmbeddingBagMemory(dim, backend="auto", **shape), draw_tokens(tokens, dim))
