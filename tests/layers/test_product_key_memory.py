"""Product-key memories against loops over tokens and heads, from the scores of all values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from million_experts.layers import ExpertUsage, MemoryPlus, ProductKeyMemory
from million_experts.optim import RowwiseAdamW

MASK = torch.tensor([True, False, True, True, False, True, False])
TINY = {"dim": 5, "num_experts": (4, 3), "num_heads": 2, "experts_per_head": 2, "key_dim": 6}


def make(kind, seed: int = 0, **settings):
    """In float64, with norms that are not those of a new layer."""
    torch.manual_seed(seed)
    layer = kind(**{**TINY, **settings}).double()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


def normalise(x: Tensor, mean: Tensor, var: Tensor, norm) -> Tensor:
    bias = 0 if norm.bias is None else norm.bias
    return (x - mean) / torch.sqrt(var + 1e-5) * norm.weight + bias


def naive(layer, x: Tensor) -> Tensor:
    queries = x @ layer.query_proj.weight.T
    norm = layer.query_norm
    if isinstance(layer, ProductKeyMemory) and not isinstance(norm, torch.nn.Identity | torch.nn.LayerNorm):
        mean, var = norm.running_mean, norm.running_var
        if layer.training:
            mean, var = queries.mean(0), queries.var(0, correction=0)
        queries = normalise(queries, mean, var, norm)
    n1, n2 = layer.codebook_sizes
    y = []
    for token, query_row in zip(x, queries, strict=True):
        total = torch.zeros(layer.dim, dtype=x.dtype)
        for head in range(layer.num_heads):
            query = query_row[head * layer.key_dim : (head + 1) * layer.key_dim]
            if isinstance(norm, torch.nn.LayerNorm):
                query = normalise(query, query.mean(), query.var(correction=0), norm)
            halves = [k if layer.share_keys else k[head] for k in (layer.keys1, layer.keys2)]
            if getattr(layer, "key_norm", None) is not None:
                halves = [
                    torch.stack([normalise(k, k.mean(), k.var(correction=0), layer.key_norm) for k in half])
                    for half in halves
                ]
            scores = torch.stack(
                [query @ torch.cat([halves[0][i], halves[1][j]]) for i in range(n1) for j in range(n2)]
            )
            best = scores.argsort(descending=True)[: layer.experts_per_head]
            gates = {
                "softmax": scores[best].exp() / scores[best].exp().sum(),
                "sigmoid": scores[best].sigmoid(),
                "relu": scores[best].clamp(min=0),
            }[layer.score]
            for gate, value in zip(gates, best.tolist(), strict=True):
                total = total + gate * layer.values[value]
        if isinstance(layer, MemoryPlus):
            z = layer.gate_proj.weight @ token
            total = layer.out_proj.weight @ (total * z / (1 + (-z).exp()))
        y.append(total)
    return torch.stack(y)


def step(layer, x: Tensor, weights: Tensor, run=None, **options) -> dict[str, Tensor]:
    """Output, gradients (sparse ones densified) and buffers of one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = (layer if run is None else run)(x, **options)
    y.backward(weights)
    grads = {n: p.grad.to_dense() if p.grad.is_sparse else p.grad for n, p in layer.named_parameters()}
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    return {"y": y.detach(), "x": x.grad, **{n: g.clone() for n, g in grads.items()}, **buffers}


CASES = [
    (ProductKeyMemory, {}, True),
    (ProductKeyMemory, {}, False),
    (ProductKeyMemory, {"query_norm": "layer", "share_keys": True, "score": "sigmoid"}, True),
    (ProductKeyMemory, {"query_norm": "none", "score": "relu", "num_heads": 1}, True),
    (ProductKeyMemory, {"sparse_grad": True, "dim": 3, "num_experts": (7, 3), "experts_per_head": 3}, True),
    (MemoryPlus, {}, True),
    (MemoryPlus, {"qk_norm": False, "share_keys": True}, True),
    (MemoryPlus, {"sparse_grad": True, "score": "sigmoid", "key_dim": 10, "dim": 7}, False),
]


@pytest.mark.parametrize(("kind", "settings", "training"), CASES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(
    kind, settings, training, backend, assert_close
):
    layer = make(kind, backend=backend, **settings).train(training)
    x, weights = torch.randn(2, 7, layer.dim, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    expected = step(twin, x, weights, run=lambda x: naive(twin, x))
    result = step(layer, x, weights)
    for name in ("y", "x", *(name for name, _ in layer.named_parameters())):
        assert_close(result[name], expected[name])


@pytest.mark.parametrize(("kind", "settings", "training"), CASES)
@pytest.mark.parametrize("content", [0.0, 1e30, float("nan"), float("inf")])
def test_masked_tokens_count_for_nothing(kind, settings, training, content, assert_close):
    layer = make(kind, **settings).train(training)
    compacted = copy.deepcopy(layer)
    x, weights = torch.randn(2, 7, layer.dim, dtype=torch.float64)
    expected = step(compacted, x[MASK], weights[MASK])
    x[~MASK] = content
    weights[~MASK] = content
    result = step(layer, x, weights, mask=MASK)
    for name in ("y", "x"):
        assert not result.pop(name)[~MASK].any()
    for name, value in result.items():
        if value.is_floating_point():
            assert_close(value, expected[name])
    _, routing = layer(x, mask=MASK, return_routing=True)
    assert not routing.gates[~MASK].any()


@pytest.mark.parametrize("kind", [ProductKeyMemory, MemoryPlus])
def test_sparse_gradients_name_the_rows_that_real_tokens_read(kind):
    layer = make(kind, sparse_grad=True, num_experts=(9, 8))
    x = torch.randn(7, 5, dtype=torch.float64)
    y, routing = layer(x, mask=MASK, return_routing=True)
    y.sum().backward()
    touched = layer.values.grad.coalesce().indices()[0]
    assert torch.equal(touched, routing.indices[MASK].unique())
    before = layer.values.detach().clone()
    RowwiseAdamW(layer.parameters(), lr=0.1).step()
    moved = (layer.values != before).any(1).nonzero()[:, 0]
    assert torch.equal(moved, touched)


@pytest.mark.parametrize("kind", [ProductKeyMemory, MemoryPlus])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("sparse_grad", [True, False])
def test_leading_dimensions(kind, lead, sparse_grad, assert_close):
    layer = make(kind, sparse_grad=sparse_grad).eval()
    x = torch.randn(*lead, 5, dtype=torch.float64, requires_grad=True)
    for mask in (None, torch.ones(lead, dtype=torch.bool), torch.zeros(lead, dtype=torch.bool)):
        y, routing = layer(x, mask=mask, return_routing=True)
        assert y.shape == x.shape
        assert [t.shape for t in routing] == [(*lead, 2, 2)] * 3
        y.sum().backward()
        if mask is None:
            assert_close(y.reshape(-1, 5), layer(x.reshape(-1, 5)))
        elif not mask.any():
            assert not y.any()
    assert layer.train()(x[:0] if lead else x[None][:0]).shape[-1] == 5


@pytest.mark.parametrize("kind", [ProductKeyMemory, MemoryPlus])
def test_other_dtypes(kind, assert_close):
    layer = make(kind, num_experts=(1, 4), experts_per_head=1)  # one sub-key: rounding changes no choice much
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = layer(x)
    assert_close(layer.float()(x.float()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    for narrow in (y, layer.bfloat16()(x.bfloat16())):
        assert narrow.dtype == torch.bfloat16
        assert (narrow - expected).abs().max() < 2**-6 * expected.abs().max()  # a few roundings of 2^-8 each


@pytest.mark.parametrize("share_keys", [False, True])
def test_names_and_shapes_of_the_state(share_keys):
    heads = () if share_keys else (2,)
    memory = {
        "query_proj.weight": (12, 5),
        "keys1": (*heads, 4, 3),
        "keys2": (*heads, 3, 3),
        "values": (12, 5),
    }

    def shapes(kind, **settings):
        state = kind(**TINY, share_keys=share_keys, **settings).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    statistics = ("running_mean", "running_var")
    batch = {f"query_norm.{name}": (12,) for name in ("weight", "bias", *statistics)}
    assert shapes(ProductKeyMemory) == memory | batch | {"query_norm.num_batches_tracked": ()}
    projections = {"gate_proj.weight": (5, 5), "out_proj.weight": (5, 5)}
    assert shapes(MemoryPlus, qk_norm=False) == memory | projections
    norms = {"query_norm.weight": (6,), "query_norm.bias": (6,), "key_norm.weight": (3,)}
    assert shapes(MemoryPlus) == memory | projections | norms


def test_defaults_are_the_papers():
    with torch.device("meta"):
        for kind in (ProductKeyMemory, MemoryPlus):
            layer = kind(16)
            assert (layer.num_experts, layer.num_heads, layer.experts_per_head) == (1024**2, 4, 32)
            assert (layer.share_keys, layer.score) == (False, "softmax")


@pytest.mark.parametrize("kind", [ProductKeyMemory, MemoryPlus])
def test_weights_start_as_the_paper_says(kind):
    torch.manual_seed(0)
    layer = kind(64, 128**2, key_dim=32)
    for keys in (layer.keys1, layer.keys2):  # uniform within 1/sqrt(16)
        assert keys.abs().max().item() == pytest.approx(0.25, rel=0.01)
        assert keys.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.02)
    assert layer.values.std().item() == pytest.approx(64**-0.5, rel=0.01)
    if kind is MemoryPlus:
        for linear in (layer.gate_proj, layer.out_proj):
            assert linear.weight.std().item() == pytest.approx(64**-0.5, rel=0.03)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layer.reset_parameters()
        drawn.append({name: p.detach().clone() for name, p in layer.named_parameters()})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not torch.equal(drawn[0]["values"], drawn[2]["values"])


def test_with_qk_norm_scores_start_with_unit_variance():
    torch.manual_seed(0)
    layer = MemoryPlus(64, 128**2, key_dim=32)
    query = layer._queries(3 * torch.randn(1000, 64), None)
    keys1, keys2 = layer._codebooks()
    scores = [torch.einsum("thd,hnd->thn", query[:, :, i], k) for i, k in enumerate((keys1, keys2))]
    assert (scores[0] + scores[1]).std().item() == pytest.approx(1, rel=0.05)


def test_layers_can_share_values(assert_close):
    first, second = make(MemoryPlus), make(MemoryPlus, 1)
    second.values = first.values
    x, weights = torch.randn(2, 7, 5, dtype=torch.float64)
    grads = [step(layer, x, weights)["values"] for layer in (first, second)]
    first.zero_grad()
    (first(x) + second(x)).backward(weights)
    assert_close(first.values.grad, grads[0] + grads[1])


def test_usage_can_be_measured():
    layer = make(ProductKeyMemory)
    with ExpertUsage(layer) as usage:
        layer(torch.randn(7, 5, dtype=torch.float64))
    assert usage.shares().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", [ProductKeyMemory, MemoryPlus])
def test_one_graph_when_compiled(kind, assert_close):
    layer = make(kind)
    twin = copy.deepcopy(layer)
    x, weights = torch.randn(2, 7, 5, dtype=torch.float64)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected = step(layer, x, weights, mask=MASK)
    for name, value in step(twin, x, weights, run=compiled, mask=MASK).items():
        if value.is_floating_point():
            assert_close(value, expected[name])


def test_arguments_and_tokens_outside_what_is_allowed_are_named():
    with pytest.raises(ValueError, match="experts_per_head must be at most 3"):
        make(ProductKeyMemory, experts_per_head=4)
    with pytest.raises(ValueError, match="query_norm must be one of"):
        make(ProductKeyMemory, query_norm="rms")
    with pytest.raises(ValueError, match=r"x must have shape \[..., 5\], got \[3, 4\]"):
        make(MemoryPlus)(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \[3\]"):
        make(MemoryPlus)(torch.zeros(3, 5), mask=torch.ones(3))
    with pytest.raises(ValueError, match="at least two real tokens"):
        make(ProductKeyMemory)(torch.zeros(1, 5, dtype=torch.float64))
