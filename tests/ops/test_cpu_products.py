"""expert_mlp by dense products against the reference in float64: shapes, types, what is not finite."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from expert_steps import Inputs, make_inputs, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from million_experts.ops import ACTIVATIONS, expert_mlp

BF16, F32 = torch.bfloat16, torch.float32
TYPES = (BF16, F32, F32)  # of tokens, gates and table


@pytest.fixture
def products(kernels, monkeypatch) -> ModuleType:
    """`million_experts.ops.cpu_products`, in use for few tokens and without matrix units too."""
    module = kernels.cpu_products
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(module, "MOST_EXPERTS_PER_PICK", 16)
    monkeypatch.setattr(module, "has_matrix_units", lambda: True)
    return module


@pytest.fixture
def used(products, monkeypatch) -> list[str]:
    """What was computed by dense products, in order; None where they gave up."""
    calls = []
    for name in ("expert_mlp", "expert_mlp_backward"):
        function = getattr(products, name)

        def call(*arguments, name=name, function=function):
            result = function(*arguments)
            calls.append(name if result is not None else None)
            return result

        monkeypatch.setattr(products, name, call)
    return calls


def rounded(tensor: Tensor) -> Tensor:
    return tensor.to(BF16).double()


def in_steps(inputs: Inputs, grad_y: Tensor, activation: str) -> dict[str, tuple[Tensor, float]]:
    """Results with bfloat16 wherever dense products have it, and how large a single pick's part can be."""
    x, indices, gates, experts = (rounded(t) if t.dtype == BF16 else t for t in inputs)
    x, gates, grad_y = x.double(), gates.double(), grad_y.double()
    table = rounded(experts)[indices]  # [T, K, R, D]
    pre, *others = rounded(torch.einsum("td,tkrd->rtk", x, table[:, :, ::2]))
    leaf = pre.clone().requires_grad_()
    hidden = getattr(torch.nn.functional, activation)(leaf)
    (slope,) = torch.autograd.grad(hidden.sum(), leaf)
    hidden = hidden.detach()
    gate = others[0] if others else torch.ones_like(pre)
    dot = rounded(torch.einsum("td,tkd->tk", grad_y, table[:, :, 1]))
    of_up = gates * hidden * gate
    of_rows = [dot * gates * slope * gate, of_up, dot * gates * hidden][: experts.shape[1]]

    def by_expert(weights: Tensor) -> Tensor:
        """[T, N], the picks of an expert summed and rounded."""
        return rounded(
            torch.zeros(len(x), len(experts), dtype=torch.float64).scatter_add(1, indices, weights)
        )

    sums = [by_expert(weights) for weights in of_rows]
    rows = rounded(experts).unbind(1)
    tokens = [x, grad_y, x]
    results = {
        "y": sums[1] @ rows[1],
        "x": sum(sums[r] @ rows[r] for r in range(0, len(rows), 2)),
        "gates": dot * hidden * gate,
        "experts": torch.stack([s.T @ t for s, t in zip(sums, tokens, strict=False)], 1),
    }
    largest = [max(w.abs().max(), (gates * dot * pre * gate).abs().max()) for w in of_rows]
    magnitude = {
        "y": (gates * pre * gate).abs().max() * experts.abs().max(),
        "x": sum(largest) * experts.abs().max(),
        "gates": (dot * pre * gate).abs().max(),
        "experts": sum(largest) * max(x.abs().max(), grad_y.abs().max()),
    }
    return {name: (result, float(magnitude[name])) for name, result in results.items()}


def check(inputs: Inputs, grad_y: Tensor, activation: str, mask: Tensor | None = None, **options) -> None:
    """Equal to the same steps in float64, but for two numbers of a pick that round to the next bfloat16."""
    x, indices, gates, experts = inputs
    actual = step(inputs, grad_y, activation, backend="cpu", mask=mask, **options)
    real = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    if not real.any():
        assert not any(tensor.any() for tensor in actual.values())
        return
    expected = in_steps((x[real], indices[real], gates[real], experts), grad_y[real], activation)
    for (name, (right, magnitude)), like in zip(expected.items(), (x, x, gates, experts), strict=True):
        result = actual[name].to_dense()
        assert result.dtype == like.dtype
        if name != "experts":
            assert not result[~real].any()
            result = result[real]
        error = (result.double() - right).abs()
        assert (error <= 2 * 2**-7 * (right.abs() + magnitude)).all(), (name, error.max(), magnitude)


# `used` is cleared for each example.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**30),
    T=st.integers(1, 70),
    K=st.integers(1, 80),
    N=st.integers(1, 60),
    D=st.sampled_from((1, 3, 8, 33, 64, 100)),
    glu=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    table=st.sampled_from((F32, BF16)),
    gates=st.sampled_from((F32, BF16)),
    masked=st.booleans(),
    sparse=st.booleans(),
    gaps=st.booleans(),
)
def test_agrees_with_the_reference(
    seed, T, K, N, D, glu, activation, table, gates, masked, sparse, gaps, used, products, spread_out
):
    inputs, grad_y = make_inputs(seed, T, K, N, D, glu, (BF16, gates, table))
    mask = torch.rand(T, generator=torch.Generator().manual_seed(seed)) > 0.3 if masked else None
    if gaps:
        inputs, grad_y = tuple(map(spread_out, inputs)), spread_out(grad_y)
    used.clear()
    check(inputs, grad_y, activation, mask=mask, sparse_grad=sparse)
    expected = ["expert_mlp", "expert_mlp_backward"]
    assert used == (
        expected if products.MOST_EXPERTS_PER_PICK * K >= N and (mask is None or mask.any()) else []
    )


@pytest.mark.parametrize("glu", [False, True])
def test_chunks_of_tokens_add_up(glu, used, products, monkeypatch):
    for chunk in (1, 7, 16, 40):
        monkeypatch.setattr(products, "CHUNK", chunk)
        inputs, grad_y = make_inputs(chunk, 40, 9, 30, 17, glu, TYPES)
        check(inputs, grad_y, "silu")
    assert len(used) == 8


def test_one_expert_that_a_token_picks_often_counts_as_often(used):
    """Exact in bfloat16: 200 picks of an expert that adds 1."""
    x, experts = torch.ones(4, 8, dtype=BF16), torch.full((3, 2, 8), 0.125)
    indices = torch.full((4, 200), 1)
    results = step((x, indices, torch.ones(4, 200), experts), torch.ones(4, 8, dtype=BF16), "relu")
    assert torch.equal(results["y"], torch.full((4, 8), 25.0, dtype=BF16))
    assert torch.equal(results["gates"], torch.ones(4, 200))
    assert results["experts"][1].eq(800.0).all()
    assert results["experts"][::2].eq(0).all()
    assert used == ["expert_mlp", "expert_mlp_backward"]


@pytest.mark.parametrize("sparse", [False, True])
def test_only_experts_that_were_picked_have_a_gradient(sparse, used):
    (x, indices, gates, experts), grad_y = make_inputs(3, 20, 4, 50, 16, False, TYPES)
    indices.remainder_(7)
    experts.requires_grad_()
    expert_mlp(x, indices, gates, experts, "gelu", sparse_grad=sparse, backend="cpu").backward(grad_y)
    if sparse:
        assert torch.equal(experts.grad.coalesce().indices()[0], torch.arange(7))
    else:
        assert experts.grad[:7].ne(0).any(-1).all()
        assert experts.grad[7:].eq(0).all()
    assert used == ["expert_mlp", "expert_mlp_backward"]


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_each_gradient_alone_has_the_same_bits(wanted, used):
    (x, indices, gates, experts), grad_y = make_inputs(6, 30, 5, 40, 37, True, TYPES)
    expected = step((x, indices, gates, experts), grad_y, "gelu", backend="cpu")
    tensors = [t.clone().requires_grad_(w) for t, w in zip((x, gates, experts), wanted, strict=True)]
    expert_mlp(tensors[0], indices, *tensors[1:], backend="cpu").backward(grad_y)
    for tensor, name, wants in zip(tensors, ("x", "gates", "experts"), wanted, strict=True):
        assert torch.equal(tensor.grad, expected[name]) if wants else tensor.grad is None
    assert used == ["expert_mlp", "expert_mlp_backward"] * 2


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("poisoned", ["x", "gates", "used", "unused", "grad_y"])
def test_what_is_not_finite_is_left_to_the_arithmetic_of_the_picks(
    poisoned, value, sparse, glu, used, products, monkeypatch
):
    inputs, of_y = make_inputs(5, 24, 4, 40, 19, glu, TYPES)
    x, indices, gates, experts = inputs
    indices.remainder_(30)
    places = {"x": x[5], "gates": gates[11], "used": experts[3], "unused": experts[35], "grad_y": of_y[2]}
    places[poisoned][..., 2] = value
    results = step(inputs, of_y, "silu", backend="cpu", sparse_grad=sparse)
    assert used == (["expert_mlp", None] if poisoned == "grad_y" else [None, None])
    monkeypatch.setattr(products, "pays", lambda *_: False)
    for name, expected in step(inputs, of_y, "silu", backend="cpu", sparse_grad=sparse).items():
        expected, actual = expected.to_dense(), results[name].to_dense()
        if poisoned == "grad_y":  # its pre-activations were rounded
            assert torch.equal(actual.isfinite(), expected.isfinite())
        else:
            assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))


def test_the_same_bits_on_every_run(used):
    inputs, grad_y = make_inputs(8, 300, 32, 400, 128, True, TYPES)
    expected = step(inputs, grad_y, "gelu", backend="cpu")
    for _ in range(4):
        for name, tensor in step(inputs, grad_y, "gelu", backend="cpu").items():
            assert torch.equal(tensor, expected[name]), name
    assert used == ["expert_mlp", "expert_mlp_backward"] * 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"T": 511}, False),
        ({"K": 16}, True),
        ({"K": 15}, False),
        ({"x": F32}, False),
        ({"x": torch.float16}, False),
        ({"table": BF16, "gates": BF16}, True),
        ({"table": torch.float16}, False),
        ({"table": torch.float64}, False),
        ({"gates": torch.float64}, False),
        ({"units": False}, False),
    ],
)
def test_when_dense_products_are_taken(change, expected, cpu, monkeypatch):
    case = {"T": 512, "K": 32, "x": BF16, "table": F32, "gates": F32, "units": True} | change
    monkeypatch.setattr(cpu.cpu_products, "has_matrix_units", lambda: case["units"])
    types = (case["x"], case["gates"], case["table"])
    inputs, _ = make_inputs(0, case["T"], case["K"], 112, 4, False, types)
    assert cpu.cpu_products.pays(*inputs) is expected


def test_what_matrix_units_are_is_what_torch_says(cpu, monkeypatch):
    has_matrix_units = cpu.cpu_products.has_matrix_units.__wrapped__
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert has_matrix_units() == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert not has_matrix_units()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_matrix_units()
