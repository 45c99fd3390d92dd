"""layer_inference, the whole layer as one operation, against the general path in float64."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from million_experts import PEER
from million_experts.ops import ACTIVATIONS

OPERATION = torch.ops.million_experts.layer_inference.default
SCORES = ("softmax", "sigmoid", "relu")
QUERY_NORMS = ("batch", "layer", "none")
TABLES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _quick_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)


def make_layer(seed: int, table: torch.dtype = torch.float32, **settings) -> PEER:
    torch.manual_seed(seed)
    small = {"dim": 33, "num_experts": (20, 17), "num_heads": 3, "experts_per_head": 5, "key_dim": 14}
    layer = PEER(**{**small, **settings}).eval()
    with torch.no_grad():
        for name, tensor in (*layer.query_norm.named_parameters(), *layer.query_norm.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
        layer.experts.mul_(10)
    layer.experts.data = layer.experts.data.to(table)
    return layer


def arguments(layer: PEER, x: Tensor) -> tuple:
    norm = layer.query_norm
    kind = "none" if isinstance(norm, torch.nn.Identity) else "layer"
    tensors = [] if kind == "none" else [norm.weight.detach(), norm.bias.detach()]
    if hasattr(norm, "running_var"):
        kind, tensors = "batch", [*tensors, norm.running_mean, norm.running_var]
    weights = [t.detach() for t in (layer.query_proj.weight, layer.keys1, layer.keys2, layer.experts)]
    return (
        x, weights[0], kind, tensors, getattr(norm, "eps", 0.0), *weights[1:], layer.num_heads,
        layer.experts_per_head, layer.score, layer.activation, "cpu",
    )  # fmt: skip


def check(layer: PEER, x: Tensor, assert_close) -> None:
    twin = copy.deepcopy(layer).double()
    twin.backend = "reference"
    expected = twin(x.double())
    assert_close(OPERATION(*arguments(layer, x)), expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("glu", "share_keys"), [(True, False), (False, True)])
@pytest.mark.parametrize("table", TABLES)
def test_equals_the_general_path(
    score, query_norm, activation, glu, share_keys, table, kernels: ModuleType, assert_close
):
    settings = dict(score=score, query_norm=query_norm, activation=activation, glu=glu, share_keys=share_keys)
    layer = make_layer(0, table, **settings)
    for tokens in (0, 1, 2, 7, 20):
        check(layer, torch.randn(tokens, layer.dim), assert_close)


@st.composite
def layers(draw: st.DrawFn) -> PEER:
    sizes = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return make_layer(
        draw(st.integers(0, 2**30)),
        draw(st.sampled_from(TABLES)),
        dim=draw(st.sampled_from([1, 2, 15, 16, 40, 129])),
        num_experts=sizes,
        num_heads=draw(st.integers(1, 5)),
        experts_per_head=draw(st.integers(1, min(sizes))),
        key_dim=2 * draw(st.sampled_from([1, 3, 16, 35])),
        glu=draw(st.booleans()),
        query_norm=draw(st.sampled_from(QUERY_NORMS)),
        score=draw(st.sampled_from(SCORES)),
        activation=draw(
            st.sampled_from(["relu", "silu"])
        ),  # GELU's tail cancels: one expert shows nothing else
        share_keys=draw(st.booleans()),
    )


@given(layer=layers(), tokens=st.integers(0, 20))
def test_equals_the_general_path_at_odd_shapes(layer, tokens, kernels, assert_close):
    check(layer, torch.randn(tokens, layer.dim), assert_close)


def test_many_experts_a_head(kernels, assert_close):
    # More than are looked for ahead of their use, and more sub-keys than a panel has.
    layer = make_layer(1, num_experts=(150, 130), experts_per_head=100, dim=16)
    check(layer, torch.randn(3, 16), assert_close)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_harms_no_other(score, query_norm, value, kernels):
    layer = make_layer(2, score=score, query_norm=query_norm, activation="relu")
    x = torch.randn(5, layer.dim)
    clean = OPERATION(*arguments(layer, x))
    x[1, 32] = value
    x[3] = value
    broken = OPERATION(*arguments(layer, x))
    assert not torch.isfinite(broken[[1, 3]]).any()
    assert torch.equal(broken[[0, 2, 4]], clean[[0, 2, 4]])


def test_infinite_token_that_every_expert_would_silence(kernels):
    # Its query is finite where it counts (gates of 1) and ReLU maps -inf to 0: only the token can tell.
    settings = dict(key_dim=2, score="sigmoid", activation="relu", query_norm="none")
    layer = make_layer(6, **settings)
    with torch.no_grad():
        for weight in (layer.query_proj.weight, layer.keys1, layer.keys2):
            weight.abs_()
        layer.experts[:, 0].abs_().neg_()
    x = torch.ones(3, layer.dim)
    x[1, 3] = float("inf")
    y = OPERATION(*arguments(layer, x))
    assert not torch.isfinite(y[1]).any()
    assert not y[[0, 2]].any()


def test_memory_with_gaps(kernels, spread_out):
    for query_norm in QUERY_NORMS:
        layer = make_layer(3, query_norm=query_norm)
        values = arguments(layer, torch.randn(3, layer.dim))
        spread = [
            spread_out(v)
            if isinstance(v, Tensor)
            else [spread_out(t) for t in v]
            if isinstance(v, list)
            else v
            for v in values
        ]
        assert torch.equal(OPERATION(*spread), OPERATION(*values))


@pytest.mark.parametrize("threads", [2, 4])
def test_the_same_bits_for_any_number_of_threads(threads, kernels):
    layer = make_layer(4, dim=200, num_experts=(300, 301), num_heads=8, key_dim=64)
    before = torch.get_num_threads()
    for tokens in (1, 16):
        x = torch.randn(tokens, 200)
        expected = OPERATION(*arguments(layer, x))
        torch.set_num_threads(threads)
        try:
            for _ in range(5):
                assert torch.equal(OPERATION(*arguments(layer, x)), expected)
        finally:
            torch.set_num_threads(before)


def test_arguments_that_do_not_fit_are_refused(cpu):
    layer = make_layer(5)
    good = arguments(layer, torch.randn(2, layer.dim))
    names = "x query_weight query_norm norm eps keys1 keys2 experts num_heads k score activation".split()
    changes = {
        "x": torch.randn(2, layer.dim + 1),
        "query_weight": layer.query_proj.weight[1:],
        "norm": good[names.index("norm")][:1],
        "keys1": layer.keys1[1:],
        "keys2": layer.keys2.double(),
        "experts": layer.experts[1:],
        "num_heads": layer.num_heads + 1,
        "k": 10**6,
        "score": "cosine",
    }
    for name, value in changes.items():
        with pytest.raises(ValueError, match="must"):
            OPERATION(*[value if n == name else a for n, a in zip(names, good, strict=False)], *good[12:])


@torch.no_grad()
def test_vmap_sees_an_operation(cpu):  # not a tensor without memory
    layer = make_layer(6).eval()
    x = torch.randn(3, 2, layer.dim)
    assert torch.equal(torch.func.vmap(layer)(x), torch.stack([layer(tokens) for tokens in x]))


@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("table", TABLES)
def test_registration_is_sound(query_norm, table, cpu):
    layer = make_layer(5, table, query_norm=query_norm)
    x = torch.randn(layer.dim, 3).t()
    opcheck(OPERATION, arguments(layer, x))
