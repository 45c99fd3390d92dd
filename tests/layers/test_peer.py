"""The layer against Algorithm 1 of arXiv 2407.04153 written out, and every rule of its contract.

`golden_peer.pt` pins the names, shapes and meaning of the state for good. It was made once, by

    torch.manual_seed(0)
    settings = dict(dim=4, num_experts=(3, 2), num_heads=2, experts_per_head=2, key_dim=4, glu=True)
    layer = PEER(**settings).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    layer(x)  # running statistics that are not those of a new layer
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    evaluated, routing = layer.eval()(x, return_routing=True)
    golden = dict(settings=settings, state=state, x=x, evaluated=evaluated.detach(),
                  indices=routing.indices, trained=layer.train()(x).detach())
    torch.save(golden, "golden_peer.pt")
"""

from __future__ import annotations

import copy
import io
import itertools
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from million_experts import PEER
from million_experts.layers.retrieval import factorise
from million_experts.ops import ACTIVATIONS, expert_mlp, product_key_topk

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
SCORES = ("softmax", "sigmoid", "relu")
QUERY_NORMS = ("batch", "layer", "none")
FUNCTIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
MASK = torch.tensor([True, False, True, True, False, True, False])


def naive_queries(layer: PEER, x: Tensor) -> Tensor:
    """[T, H, key_dim] in x's dtype."""
    norm, heads = layer.query_norm, (layer.num_heads, layer.key_dim)
    queries = x @ layer.query_proj.weight.to(x.dtype).T
    if isinstance(norm, torch.nn.Identity):
        return queries.unflatten(-1, heads)
    if isinstance(norm, torch.nn.LayerNorm):
        queries = queries.unflatten(-1, heads)
        mean, var = queries.mean(-1, keepdim=True), queries.var(-1, correction=0, keepdim=True)
    elif layer.training:
        mean, var = queries.mean(0), queries.var(0, correction=0)
    else:
        mean, var = norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype)
    queries = (queries - mean) / torch.sqrt(var + 1e-5) * norm.weight.to(x.dtype) + norm.bias.to(x.dtype)
    return queries.reshape(len(x), *heads)


def algorithm_1(layer: PEER, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, D], indices and gates [T, H, k]: head by head, from the scores of all N experts."""
    queries, width = naive_queries(layer, x), layer.key_dim // 2
    n1, n2 = layer.codebook_sizes
    experts = layer.experts.to(x.dtype)
    y, indices, gates = torch.zeros_like(x), [], []
    for head in range(layer.num_heads):
        keys1, keys2 = (
            (keys if layer.share_keys else keys[head]).to(x.dtype) for keys in (layer.keys1, layer.keys2)
        )
        product_keys = torch.stack([torch.cat([keys1[i], keys2[j]]) for i in range(n1) for j in range(n2)])
        assert product_keys.shape == (layer.num_experts, 2 * width)
        scores, best = (queries[:, head] @ product_keys.T).topk(layer.experts_per_head)
        if layer.score == "softmax":
            gate = scores.exp() / scores.exp().sum(-1, keepdim=True)
        else:
            gate = 1 / (1 + (-scores).exp()) if layer.score == "sigmoid" else scores.clamp(min=0)
        for k in range(layer.experts_per_head):
            rows = experts[best[:, k]]
            hidden = FUNCTIONS[layer.activation]((x * rows[:, 0]).sum(-1))
            if layer.glu:
                hidden = hidden * (x * rows[:, 2]).sum(-1)
            y = y + (gate[:, k] * hidden)[:, None] * rows[:, 1]
        indices.append(best)
        gates.append(gate)
    return y, torch.stack(indices, 1), torch.stack(gates, 1)


def step(layer: PEER, x: Tensor, weights: Tensor, run=None, **options) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = (layer if run is None else run)(x, **options)
    y.backward(weights)
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    return {
        "y": y.detach(),
        "x": x.grad,
        **buffers,
        **{n: p.grad.clone() for n, p in layer.named_parameters()},
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict, int, bool]:
    sizes = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    settings = {
        "dim": draw(st.integers(1, 7)),
        "num_experts": sizes,
        "num_heads": draw(st.integers(1, 3)),
        "experts_per_head": draw(st.integers(1, min(sizes))),
        "key_dim": 2 * draw(st.integers(1, 4)),
        "glu": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "query_norm": draw(st.sampled_from(QUERY_NORMS)),
        "share_keys": draw(st.booleans()),
        "score": draw(st.sampled_from(SCORES)),
        "seed": draw(st.integers(0, 2**30)),
    }
    return settings, draw(st.integers(2, 6)), draw(st.booleans())


@given(case=cases())
def test_is_algorithm_1(case, make_layer, assert_close):
    settings, tokens, training = case
    layer = make_layer(**settings).train(training)
    x = torch.randn(tokens, layer.dim, dtype=torch.float64)
    expected, indices, gates = algorithm_1(layer, x)
    y, routing = layer(x, return_routing=True)
    assert torch.equal(routing.indices, indices)
    assert_close(routing.gates, gates)
    assert_close(y, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("glu", "share_keys"), [(True, False), (False, True)])
def test_gradients_are_those_of_algorithm_1(
    training, query_norm, score, glu, share_keys, make_layer, assert_close, backend
):
    layer = make_layer(
        query_norm=query_norm, score=score, glu=glu, share_keys=share_keys, backend=backend
    ).train(training)
    x, weights = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = step(copy.deepcopy(layer), x, weights, run=None)
    twin = copy.deepcopy(layer)
    naive = step(twin, x, weights, run=lambda x: algorithm_1(twin, x)[0])
    for name in ("x", *(n for n, _ in layer.named_parameters())):
        assert_close(expected[name], naive[name])


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_leading_dimensions(lead, with_mask, make_layer, backend):
    layer = make_layer(backend=backend).eval()
    x = torch.randn(*lead, 5, dtype=torch.float64)
    mask = torch.rand(lead) > 0.3 if with_mask else None
    y, routing = layer(x, mask=mask, return_routing=True)
    assert y.shape == x.shape
    assert [t.shape for t in routing] == [(*lead, 2, 2)] * 3
    assert [t.dtype for t in routing] == [torch.int64, torch.float64, torch.float64]
    assert torch.equal(y, layer(x, mask=mask))
    flat = layer(x.reshape(-1, 5), mask=None if mask is None else mask.reshape(-1))
    assert torch.equal(y.reshape(-1, 5), flat)


def test_leading_dimensions_in_training(make_layer):
    layer = make_layer()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    assert torch.equal(layer(x).flatten(0, 1), layer(x.flatten(0, 1)))
    assert layer(x[:0]).shape == (0, 4, 5)
    assert layer(x.transpose(0, 1)).shape == (4, 2, 5)


def test_routing_is_that_of_the_operations(make_layer):
    layer = make_layer(query_norm="none")
    x = torch.randn(7, 5, dtype=torch.float64)
    query = F.linear(x, layer.query_proj.weight).view(7, 2, 2, 3)
    scores, indices = product_key_topk(query, layer.keys1, layer.keys2, 2)
    _, routing = layer(x, return_routing=True)
    assert torch.equal(routing.indices, indices)
    assert torch.equal(routing.scores, scores)
    assert (routing.scores[..., :-1] >= routing.scores[..., 1:]).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("content", [0.0, 1e30, float("nan"), float("inf")])
def test_masked_tokens_count_for_nothing(
    training, query_norm, score, content, make_layer, assert_close, backend
):
    layer = make_layer(query_norm=query_norm, score=score, glu=True, backend=backend).train(training)
    compacted = copy.deepcopy(layer)
    x, weights = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = step(compacted, x[MASK], weights[MASK])
    expected_routing = compacted.train(training)(x[MASK], return_routing=True)[1]
    x[~MASK] = content
    weights[~MASK] = content
    result = step(layer, x, weights, mask=MASK)
    for name in ("y", "x"):
        masked = result.pop(name)
        assert_close(masked[MASK], expected.pop(name))
        assert torch.equal(masked[~MASK], torch.zeros_like(masked[~MASK]))
    assert result.keys() == expected.keys()
    # With softmax, picks that share a sub-key cancel in its gradient, and all of it may be rounding: it is
    # compared at the size of the largest gradient, as its terms have that size.
    size = max(float(right.abs().max()) for right in expected.values() if right.numel())
    for name, right in expected.items():
        offset = size if name.startswith("keys") else 0
        assert_close(result[name] + offset, right + offset, torch.float64)
    routing = layer(x, mask=MASK, return_routing=True)[1]
    assert torch.equal(routing.indices[MASK], expected_routing.indices)
    assert_close(routing.gates[MASK], expected_routing.gates)
    assert torch.equal(routing.gates[~MASK], torch.zeros_like(routing.gates[~MASK]))
    assert ((routing.indices >= 0) & (routing.indices < layer.num_experts)).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_real_token_is_too_few_for_batch_norm(tokens, make_layer):
    layer = make_layer()
    before = {name: b.clone() for name, b in layer.named_buffers()}
    mask = torch.arange(tokens) == 1 if tokens > 1 else None
    with pytest.raises(ValueError, match=rf"at least two real tokens .*, got 1 of {tokens}"):
        layer(torch.randn(tokens, 5, dtype=torch.float64), mask=mask)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    for query_norm in ("layer", "none"):
        x = torch.randn(tokens, 5, dtype=torch.float64)
        assert make_layer(query_norm=query_norm)(x, mask=mask).any()


@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("lead", [(3,), (2, 2)])
def test_nothing_but_masked_tokens_is_refused_in_training(query_norm, lead, make_layer):
    layer = make_layer(query_norm=query_norm)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    x, mask = torch.randn(*lead, 5, dtype=torch.float64), torch.zeros(lead, dtype=torch.bool)
    total = mask.numel()
    with pytest.raises(
        ValueError, match=rf"mask must leave at least one real token in training, .* of {total}"
    ):
        layer(x, mask=mask)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="mask must leave at least"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask=mask)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    assert layer(x[:0], mask=mask[:0]).shape == (0, *lead[1:], 5)


@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("score", SCORES)
def test_nothing_but_masked_tokens_gives_zeros_in_eval(query_norm, score, make_layer, backend):
    layer = make_layer(query_norm=query_norm, score=score, backend=backend).eval()
    x, weights = torch.full((2, 7, 5), float("nan"), dtype=torch.float64)
    result = step(layer, x, weights, mask=torch.zeros(7, dtype=torch.bool))
    buffers = dict(layer.named_buffers())
    for name, tensor in result.items():
        if name not in buffers:
            assert torch.equal(tensor, torch.zeros_like(tensor)), name


@pytest.mark.parametrize(
    ("mask", "came"),
    [
        (torch.ones(7, dtype=torch.bool), r"torch\.bool \[7\]"),
        (torch.ones(2, 7, 1, dtype=torch.bool), r"torch\.bool \[2, 7, 1\]"),
        (torch.ones(2, 7, dtype=torch.int64), r"torch\.int64 \[2, 7\]"),
        (torch.ones(2, 7), r"torch\.float32 \[2, 7\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, came, make_layer):
    with pytest.raises(ValueError, match=rf"mask must be bool of shape \[2, 7\].*, got {came}"):
        make_layer()(torch.randn(2, 7, 5, dtype=torch.float64), mask=mask)


@pytest.mark.parametrize("shape", [(5, 4), (4,), ()])
def test_tokens_of_another_width_are_refused(shape, make_layer):
    with pytest.raises(
        ValueError, match=rf"x must have shape \[..., 5\], got \[{', '.join(map(str, shape))}\]"
    ):
        make_layer()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("glu", [False, True])
def test_token_that_is_not_finite(score, activation, query_norm, value, glu, make_layer, backend):
    layer = make_layer(
        score=score, activation=activation, query_norm=query_norm, glu=glu, backend=backend
    ).eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    x[2, 3] = value
    x[4] = value
    broken, broken_routing = layer(x, return_routing=True)
    assert not torch.isfinite(broken[[2, 4]]).any()
    assert ((broken_routing.indices >= 0) & (broken_routing.indices < layer.num_experts)).all()
    others = torch.tensor([0, 1, 3, 5, 6])
    assert torch.equal(broken[others], y[others])
    for a, b in zip(broken_routing, routing, strict=True):
        assert torch.equal(a[others], b[others])
    if query_norm != "batch":
        assert torch.equal(layer.train()(x)[others], y[others])
    else:
        assert not torch.isfinite(layer.train()(x)[[2, 4]]).any()


def test_infinite_token_that_every_expert_would_silence(make_layer, backend):
    # Its query is finite where it counts (gates of 1) and ReLU maps -inf to 0: only the retrieval can tell.
    layer = make_layer(
        key_dim=2, score="sigmoid", activation="relu", query_norm="none", backend=backend
    ).eval()
    with torch.no_grad():
        for weight in (layer.query_proj.weight, layer.keys1, layer.keys2):
            weight.abs_()
        layer.experts[:, 0].abs_().neg_()
    x = torch.ones(3, 5, dtype=torch.float64)
    x[1, 3] = float("inf")
    y = layer(x)
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_output_has_the_dtype_of_x(dtypes, query_norm, training, make_layer, assert_close, backend):
    of_x, of_layer = dtypes
    layer = make_layer(query_norm=query_norm, backend=backend).to(of_layer).train(training)
    x = torch.randn(7, 5).to(of_x)
    result = step(layer, x, x)
    assert result["y"].dtype == result["x"].dtype == of_x
    assert all(result[name].dtype == of_layer for name, _ in layer.named_parameters())
    if of_x != of_layer or of_x != torch.bfloat16:  # there queries are bfloat16, and other experts may win
        # x is not rounded because the layer is bfloat16, nor the layer because x is.
        expected, indices, _ = algorithm_1(layer.train(training), x.double())
        _, routing = layer(x, return_routing=True)
        assert torch.equal(routing.indices, indices)
        precise = torch.float32 if torch.float64 != of_layer != of_x else None
        assert_close(result["y"], expected, precise if of_x != torch.bfloat16 else None)


def test_statistics_stay_float32_in_a_bfloat16_layer(make_layer):
    layer = make_layer().float()
    statistics = {name: b.clone() for name, b in layer.named_buffers()}
    low = copy.deepcopy(layer).to(torch.bfloat16)
    assert low.experts.dtype == low.query_norm.weight.dtype == torch.bfloat16
    for name, buffer in low.named_buffers():
        assert buffer.dtype == statistics[name].dtype
        assert torch.equal(buffer, statistics[name])
    assert low.to("meta").query_norm.running_var.dtype == torch.float32
    assert low.query_norm.running_var.is_meta

    low = copy.deepcopy(layer).half().bfloat16()
    assert torch.equal(low.query_norm.running_var, statistics["query_norm.running_var"])
    x = torch.randn(50, 5).bfloat16()
    low(x)
    assert low.query_norm.running_mean.dtype == torch.float32
    assert not torch.equal(low.query_norm.running_mean, statistics["query_norm.running_mean"])

    file = io.BytesIO()
    torch.save(low.state_dict(), file)
    file.seek(0)
    for target in (copy.deepcopy(layer), copy.deepcopy(layer).to(torch.bfloat16)):
        target.load_state_dict(torch.load(file, weights_only=True))
        file.seek(0)
        assert torch.equal(target.query_norm.running_var, low.query_norm.running_var)
        assert torch.equal(target.experts.bfloat16(), low.experts)
    assert layer.double().query_norm.running_mean.dtype == torch.float64


def test_autocast(make_layer):
    layer = make_layer(query_norm="none").float()
    x, weights = torch.randn(2, 7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x, return_routing=True)
        result = step(layer, x, weights.bfloat16())
    # The projection runs in bfloat16, scores and gates in float32, and the table is not cast.
    query = F.linear(x.bfloat16(), layer.query_proj.weight.bfloat16()).view(7, 2, 2, 3)
    scores, indices = product_key_topk(query, layer.keys1, layer.keys2, 2)
    assert torch.equal(routing.scores, scores)
    assert torch.equal(routing.indices, indices)
    assert torch.equal(routing.gates, scores.softmax(-1))
    gates = routing.gates.bfloat16().flatten(1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expert_mlp(x.bfloat16(), indices.flatten(1), gates, layer.experts))
    assert not torch.equal(y, expert_mlp(x.bfloat16(), indices.flatten(1), gates, layer.experts.bfloat16()))
    for name in ("x", *(n for n, _ in layer.named_parameters())):
        assert result[name].dtype == torch.float32
        assert result[name].any()


def test_autocast_keeps_batch_statistics_in_float32(make_layer, backend):
    layer = make_layer(backend=backend).float()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(7, 5))
    assert layer.query_norm.running_var.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mask", [None, MASK])
def test_checkpointing_changes_nothing(use_reentrant, mask, make_layer, backend):
    layer = make_layer(glu=True, backend=backend)
    x, weights = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = step(copy.deepcopy(layer), x, weights, mask=mask)
    assert expected["query_norm.num_batches_tracked"] == 1
    result = step(layer, x, weights, run=lambda x: checkpoint(layer, x, mask, use_reentrant=use_reentrant))
    for name, right in expected.items():
        assert torch.equal(result[name], right), name


@pytest.mark.parametrize("query_norm", ["batch", "layer"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_compiled_as_one_graph(query_norm, mask, make_layer, assert_close, backend):
    torch.compiler.reset()
    layer = make_layer(glu=query_norm == "layer", query_norm=query_norm, score="sigmoid", backend=backend)
    x, weights = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = step(copy.deepcopy(layer), x, weights, mask=mask)
    result = step(layer, x, weights, run=torch.compile(layer, fullgraph=True), mask=mask)
    for name, right in expected.items():
        assert_close(result[name], right, torch.float64)


def test_compiled_in_eval(make_layer, assert_close, backend):
    torch.compiler.reset()
    layer = make_layer(backend=backend).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 8):
        x = torch.randn(tokens, 5, dtype=torch.float64)
        assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [None, MASK])
def test_export(training, mask, make_layer, assert_close, backend):
    layer = make_layer(backend=backend).train(training)
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = copy.deepcopy(layer)(x, mask=mask)
    program = torch.export.export(layer, (x,), {"mask": mask})
    assert_close(program.module()(x, mask=mask), expected)


@pytest.mark.parametrize("training", [True, False])
def test_export_with_any_number_of_tokens(training, make_layer, assert_close, backend):
    layer = make_layer(backend=backend).train(training)
    x = torch.randn(7, 5, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    longer = torch.randn(11, 5, dtype=torch.float64)
    assert_close(program.module()(longer), layer(longer))


def test_a_deep_copy_is_independent(make_layer):
    layer = make_layer()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.experts.zero_()
    assert layer.experts.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, r"dim must be a positive int, got 0"),
        ({"dim": 2.5}, r"dim must be a positive int, got 2\.5"),
        ({"num_heads": 0}, r"num_heads must be a positive int, got 0"),
        ({"experts_per_head": -1}, r"experts_per_head must be a positive int, got -1"),
        ({"key_dim": 0}, r"key_dim must be a positive int, got 0"),
        ({"key_dim": 7}, r"key_dim counts both halves of a query and must be even, got 7"),
        ({"experts_per_head": 4}, r"experts_per_head must be at most 3, .* codebooks \(4, 3\), got 4"),
        ({"num_experts": 0}, r"num_experts must be positive, got 0"),
        ({"num_experts": (4, 0)}, r"num_experts must be a pair of positive sizes, got \(4, 0\)"),
        ({"num_experts": (4, 3, 2)}, r"num_experts must be an int or a pair of ints .*, got \(4, 3, 2\)"),
        ({"num_experts": 12.0}, r"num_experts must be an int or a pair of ints .*, got 12\.0"),
        ({"num_experts": True}, r"num_experts must be an int or a pair of ints .*, got True"),
        ({"activation": "tanh"}, r"activation must be one of 'gelu', 'relu', 'silu', got 'tanh'"),
        ({"score": "max"}, r"score must be one of 'softmax', 'sigmoid', 'relu', got 'max'"),
        ({"query_norm": "rms"}, r"query_norm must be one of 'batch', 'layer', 'none', got 'rms'"),
        ({"backend": "cuda"}, r"backend must be one of .*, got 'cuda'"),
        ({"init_std": 0}, r"init_std must be positive, got 0"),
        ({"init_std": float("nan")}, r"init_std must be positive, got nan"),
    ],
)
def test_arguments_outside_what_is_allowed_are_named(arguments, message):
    good = {"dim": 5, "num_experts": (4, 3), "num_heads": 2, "experts_per_head": 2, "key_dim": 6}
    with pytest.raises(ValueError, match=message):
        PEER(**(good | arguments))


def usable(number: int) -> bool:
    """There are n1 * n2 = number with n2 <= n1 <= 4 * n2."""
    return any(number % n == 0 and n * n <= number <= 4 * n * n for n in range(1, number + 1))


@pytest.mark.parametrize("number", range(1, 400))
def test_an_int_takes_its_most_square_factorisation(number):
    if usable(number):
        n1, n2 = factorise(number)
        assert n1 * n2 == number
        assert n2 <= n1 <= 4 * n2
        assert not any(number % n == 0 for n in range(n2 + 1, int(number**0.5) + 1))
        return
    below = next(n for n in range(number, 0, -1) if usable(n))
    above = next(n for n in itertools.count(number) if usable(n))
    with pytest.raises(
        ValueError, match=rf"num_experts={number} has no .* that work are {below} or {above},"
    ):
        factorise(number)


@pytest.mark.parametrize("number", [2**40 - 87, 10**18 + 9, 2**63, (2**21, 2**20), (10**30, 1)])
def test_sizes_beyond_any_table_are_answered_at_once(number):
    start = time.monotonic()
    message = r"num_experts(=\d+ has no factorisation| must be at most 1099511627776)"
    with pytest.raises(ValueError, match=message):
        factorise(number)
    assert time.monotonic() - start < 5


def test_the_largest_table_has_its_factors():
    assert factorise(2**40) == (2**20, 2**20)
    assert factorise(2**39) == (2**20, 2**19)


def test_a_pair_is_taken_as_it_is():
    assert factorise((2, 90)) == factorise([2, 90]) == (2, 90)
    assert factorise(1024**2) == (1024, 1024)
    assert PEER(4, (3, 7), 1, 2, 4).codebook_sizes == (3, 7)


@pytest.mark.parametrize(
    ("query_norm", "names"),
    [
        ("batch", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]),
        ("layer", ["weight", "bias"]),
        ("none", []),
    ],
)
def test_names_and_shapes_of_the_state(query_norm, names):
    layer = PEER(5, (4, 3), 2, 2, 6, query_norm=query_norm)
    state = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    expected = {f"query_norm.{name}" for name in names} | {"query_proj.weight", "keys1", "keys2", "experts"}
    assert state.keys() == expected
    assert state["query_proj.weight"] == (12, 5)
    assert (state["keys1"], state["keys2"]) == ((4, 3), (3, 3))
    assert state["experts"] == (12, 2, 5)
    per_head = PEER(5, (4, 3), 2, 2, 6, share_keys=False, glu=True).state_dict()
    assert (per_head["keys1"].shape, per_head["keys2"].shape) == ((2, 4, 3), (2, 3, 3))
    assert per_head["experts"].shape == (12, 3, 5)


@pytest.mark.parametrize("share_keys", [True, False])
def test_sub_keys_appended_to_the_first_codebook_move_no_expert(share_keys, make_layer):
    layer = make_layer(num_experts=(4, 3), share_keys=share_keys, query_norm="none").eval()
    grown = make_layer(num_experts=(6, 3), share_keys=share_keys, query_norm="none").eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    with torch.no_grad():
        # The first feature is 1 and the first coordinate of every query reads it alone. The new sub-keys say
        # no to it, the others do not see it, so every token stays with the old experts.
        x[:, 0] = 1
        firsts = layer.query_proj.weight.view(2, 6, 5)[:, 0]
        firsts.zero_()
        firsts[:, 0] = 1
        layer.keys1[..., 0] = 0
        state = layer.state_dict()
        new = torch.randn_like(layer.keys1[..., :2, :])
        new[..., 0] = -1e6
        state["keys1"] = torch.cat([layer.keys1, new], -2)
        state["experts"] = torch.cat([layer.experts, torch.full((6, 2, 5), float("nan"))])
    grown.load_state_dict(state)
    before, after = layer(x, return_routing=True), grown(x, return_routing=True)
    assert torch.equal(after[1].indices, before[1].indices)
    assert torch.equal(after[0], before[0])


def test_golden_checkpoint(assert_close, backend):
    golden = torch.load(Path(__file__).with_name("golden_peer.pt"), weights_only=True)
    layer = PEER(**golden["settings"], backend=backend).double()
    layer.load_state_dict(golden["state"], strict=True)
    y, routing = layer.eval()(golden["x"], return_routing=True)
    assert torch.equal(routing.indices, golden["indices"])
    assert_close(y, golden["evaluated"])
    assert_close(layer.train()(golden["x"]), golden["trained"])


def test_representation_names_the_settings(make_layer):
    text = repr(make_layer(glu=True))
    assert "num_experts=12 (4 x 3)" in text
    assert "glu=True" in text
