"""expert_mlp by the C++ kernels against the reference in float64: instruction sets, schedules, extremes."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from expert_steps import Inputs, make_inputs, step
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from million_experts.ops import ACTIVATIONS, expert_mlp

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FUNCTIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
# No width of a vector, or of a few, divides them all: 16 vectors of 16 floats are the longest run.
WIDTHS = (1, 3, 8, 17, 31, 64, 100, 257, 300)


def reference_step(inputs: Inputs, grad_y: Tensor, activation: str, **options) -> dict[str, Tensor]:
    x, indices, gates, experts = inputs
    wide = (x.double(), indices, gates.double(), experts.double())
    return step(wide, grad_y.double(), activation, backend="reference", **options)


def block_size(kernels: ModuleType, number: int | None) -> pytest.MonkeyPatch:
    """Lets a tile of tokens meet that many experts at a time; None: token by token."""
    patch = pytest.MonkeyPatch()
    patch.setattr(kernels, "block_experts", lambda T, K, N, size: N if number is None else min(N, number))
    return patch


def check(
    kernels, inputs, grad_y, activation, assert_close, block=None, spread=lambda t: t, **options
) -> None:
    expected = reference_step(inputs, grad_y, activation, **options)
    patch = block_size(kernels, block)
    try:
        actual = step(tuple(map(spread, inputs)), spread(grad_y), activation, backend="cpu", **options)
    finally:
        patch.undo()
    dtypes = {
        "y": inputs[0].dtype,
        "x": inputs[0].dtype,
        "gates": inputs[2].dtype,
        "experts": inputs[3].dtype,
    }
    for name, right in expected.items():
        assert actual[name].dtype == dtypes[name]
        assert_close(actual[name], right)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    dtypes = draw(st.tuples(*[st.sampled_from(DTYPES)] * 3))
    N = draw(st.integers(1, 60))
    inputs, grad_y = make_inputs(
        draw(st.integers(0, 2**30)),
        T=draw(st.integers(0, 40)),
        K=draw(st.integers(0, 20)),
        N=N,
        D=draw(st.sampled_from(WIDTHS)),
        glu=draw(st.booleans()),
        dtypes=dtypes,
    )
    if draw(st.booleans()):  # few of the experts, often repeated
        inputs[1].remainder_(draw(st.integers(1, N)))
    mask = torch.rand(len(inputs[0])) > 0.3 if draw(st.booleans()) else None
    return {
        "inputs": inputs,
        "grad_y": grad_y,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "block": draw(st.sampled_from([None, 1, 2, 4, 8])),
        "mask": mask,
    }


@given(case=cases(), gaps=st.booleans())
def test_agrees_with_the_reference(case, gaps, kernels, assert_close, spread_out):
    check(kernels, assert_close=assert_close, **(case | ({"spread": spread_out} if gaps else {})))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize(
    "N", [10, 2000]
)  # 120 and 0.6 pairs an expert: both schedules of the table's gradient
def test_every_width_and_schedule(activation, glu, block, N, kernels, assert_close):
    for D, dtypes in itertools.product(
        WIDTHS, [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16)]
    ):
        inputs, grad_y = make_inputs(D, 40, 30, N, D, glu, dtypes)
        check(kernels, inputs, grad_y, activation, assert_close, block)


@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [10, 400])
def test_every_dtype_of_the_table(table, sums, N, kernels, assert_close):
    for block, glu, D in ((None, True, 33), (4, False, 100)):
        inputs, grad_y = make_inputs(1, 40, 10, N, D, glu, (sums, sums, table))
        check(kernels, inputs, grad_y, "silu", assert_close, block)


@pytest.mark.parametrize("block", [None, 1])
def test_tiny_shapes(block, kernels, assert_close):
    for T, K, N, D in itertools.product((1, 2), (1, 2, 9), (1, 2), (1, 16)):
        for glu in (False, True):
            inputs, grad_y = make_inputs(T, T, K, N, D, glu)
            check(kernels, inputs, grad_y, "gelu", assert_close, block)


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 1023, 1024, 1025, 2100])  # tiles have 16 and 1024
def test_tiles_of_tokens(tokens, block, kernels, assert_close):
    inputs, grad_y = make_inputs(2, tokens, 4, 50, 5, True)
    check(kernels, inputs, grad_y, "silu", assert_close, block)


# 410 tokens go backward in two parts. The second adds to the gradient, row by row as experts have few pairs.
@pytest.mark.parametrize("D", [16, 33, 256])
@pytest.mark.parametrize("glu", [False, True])
def test_parts_of_tokens_add_up_row_by_row(D, glu, kernels, assert_close):
    T, K, N = 410, 4, 50
    step = kernels.backward_tokens(T, K, N, False)
    assert step < T
    assert (T - step) % step * K < 4 * N
    check(kernels, *make_inputs(3, T, K, N, D, glu), "gelu", assert_close)


def test_as_many_tokens_go_backward_as_32_bits_count_pairs(cpu):
    assert cpu.backward_tokens(2**33, 1, 2**30, False) * 1 < 2**32
    assert cpu.backward_tokens(2**33, 128, 2**31, False) * 128 < 2**32


def test_the_schedule_follows_the_reuse(cpu):
    # 1024 tokens with 128 of 16,384 experts: 8 meet each expert; of a million: 1 in 8 experts is met.
    assert cpu.block_experts(1024, 128, 128**2, 2048) < 128**2
    assert cpu.block_experts(1024, 128, 1024**2, 2048) == 1024**2
    assert cpu.block_experts(1, 128, 128**2, 2048) == 128**2
    assert cpu.block_experts(4096, 128, 100, 2048) == 100  # a table that stays in the cache
    for arguments in ((0, 8, 5, 64), (9, 0, 5, 64), (9, 9, 0, 64), (4096, 64, 9, 2**30)):
        block = cpu.block_experts(*arguments)
        assert 0 <= block <= arguments[2]
        assert block == arguments[2] or block.bit_count() == 1


@pytest.mark.parametrize(
    ("glu", "D", "dtype"),
    [
        (False, 256, torch.float32),
        (True, 251, torch.float32),
        (False, 256, torch.bfloat16),
        (False, 99, torch.float16),
    ],
)
@pytest.mark.parametrize("pairs", [0, 600])
def test_gradients_larger_than_the_caches(glu, D, dtype, pairs, kernels, assert_close):
    # From 32 MiB on the gradient is written past the caches, into a buffer that held something else before.
    N = 33 * 2**20 // (dtype.itemsize * D * (3 if glu else 2))
    inputs, grad_y = make_inputs(3, pairs // 6, 6, N, D, glu, (torch.float32, torch.float32, dtype))
    for _ in range(2):
        actual = step(inputs, grad_y, "gelu", backend="cpu")["experts"]
        chosen, places = inputs[1].unique(return_inverse=True)
        small = (inputs[0], places.view_as(inputs[1]), inputs[2], inputs[3][chosen])
        expected = reference_step(small, grad_y, "gelu")["experts"]
        assert_close(actual[chosen], expected)
        untouched = torch.ones(N, dtype=torch.bool)
        untouched[chosen] = False
        assert not actual[untouched].any()
        actual.fill_(float("nan"))


MAGNITUDES = [
    0.0,
    1e-45,
    1e-40,
    1e-30,
    1e-3,
    0.7,
    3,
    5.5,
    5.54,
    5.55,
    6,
    10,
    13.2,
    14,
    50,
    86.5,
    87,
    87.5,
    88,
]
MAGNITUDES += [88.5, 89, 100, 1e4, 1e15, 1e30, 3e38]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_pre_activations(activation, dtype, kernels):
    """Element by element: y is the activation at z, and the gradient of x its slope."""
    magnitudes = torch.tensor(MAGNITUDES)
    z = torch.cat([magnitudes, -magnitudes, torch.linspace(-20, 20, 2001)]).to(dtype)
    x = z[:, None].clone().requires_grad_()
    first, gates, ones = torch.zeros(len(z), 1, dtype=torch.int64), torch.ones(len(z), 1), torch.ones(1, 2, 1)
    y = expert_mlp(x, first, gates.to(dtype), ones.to(dtype), activation, backend="cpu")[:, 0]
    y.sum().backward()
    wide = z.double().requires_grad_()
    expected = FUNCTIONS[activation](wide)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    # GELU's factor 1 + erf cancels below 0: an error of a number's last bits, times z, down to z = -6, where
    # the function ends. 1e-44: float32 counts in steps of 1.4e-45 there.
    unit = 4e-7 if dtype == torch.float32 else 1e-15
    allowed = unit * expected.abs() + unit * wide.abs().clamp(max=6) + 1e-44
    for actual, right, most in ((y, expected, allowed), (x.grad[:, 0], slope, 6 * unit)):
        excess = (actual.detach().double() - right).abs() - most
        worst = excess.argmax()
        assert excess[worst] <= 0, f"at {z[worst]:.6g}: {actual[worst]:.6g} instead of {right[worst]:.6g}"


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_huge_and_tiny_values(block, glu, activation, scale, kernels):
    inputs, grad_y = make_inputs(4, 9, 5, 12, 33, glu)
    if glu:
        scale = min(scale, 1e15)  # its square is what the gate's row learns from
    inputs[3][:, 2:] /= scale
    inputs[0].mul_(scale)
    expected = reference_step(inputs, grad_y, activation)
    patch = block_size(kernels, block)
    try:
        actual = step(inputs, grad_y, activation, backend="cpu")
    finally:
        patch.undo()
    for name, right in expected.items():
        if not glu or scale > 1e-42:  # 1 / 1e-42 is infinite in float32
            # A few of float32's smallest steps, times the largest row: numbers below 1e-38 have few digits.
            error = (actual[name].double() - right).abs().max()
            assert error <= 1e-5 * right.abs().max() + 1e-42 * max(1, inputs[3].abs().max()), name


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("table", DTYPES[:3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_with_its_tokens_and_experts(block, glu, table, value, kernels):
    inputs, grad_y = make_inputs(5, 24, 4, 40, 19, glu, (torch.float32, torch.float32, table))
    x, indices, gates, experts = inputs
    indices.remainder_(30)
    indices[indices == 7] = 8
    indices[3, 1] = indices[20, 3] = 7
    patch = block_size(kernels, block)
    try:
        clean = step(inputs, grad_y, "silu", backend="cpu")
        for poisoned, tokens in (("x", [5]), ("gates", [11]), ("experts", [3, 20]), ("grad_y", [2])):
            x, indices, gates, experts = (t.clone() for t in inputs)
            of_y = grad_y.clone()
            if poisoned == "x":
                x[5, 18] = value
            elif poisoned == "gates":
                gates[11, 2] = value
            elif poisoned == "experts":
                experts[7] = value
            else:
                of_y[2, 3] = value
            broken = step((x, indices, gates, experts), of_y, "silu", backend="cpu")
            others = torch.ones(24, dtype=torch.bool)
            others[tokens] = False
            if poisoned != "grad_y":
                assert not torch.isfinite(broken["y"][tokens]).all(-1).any()
            else:
                assert not torch.isfinite(broken["x"][tokens]).any()
            for name in ("y", "x", "gates"):
                assert torch.equal(broken[name][others], clean[name][others]), (poisoned, name)
            spared = torch.ones(40, dtype=torch.bool)
            spared[indices[tokens].flatten()] = False
            assert torch.equal(broken["experts"][spared], clean["experts"][spared])
    finally:
        patch.undo()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_each_gradient_alone_has_the_same_bits(wanted, kernels):
    for block, N in ((None, 300), (4, 10)):
        (x, indices, gates, experts), grad_y = make_inputs(6, 30, 5, N, 37, True)
        patch = block_size(kernels, block)
        try:
            expected = step((x, indices, gates, experts), grad_y, "gelu", backend="cpu")
            tensors = [t.clone().requires_grad_(w) for t, w in zip((x, gates, experts), wanted, strict=True)]
            expert_mlp(tensors[0], indices, *tensors[1:], backend="cpu").backward(grad_y)
        finally:
            patch.undo()
        for tensor, name, wants in zip(tensors, ("x", "gates", "experts"), wanted, strict=True):
            assert torch.equal(tensor.grad, expected[name]) if wants else tensor.grad is None


def test_gradients_of_a_narrow_table_are_rounded_once(kernels):
    # 600 tokens of one expert: a sum kept in bfloat16 would lose all but the first few hundred.
    x, indices, gates = torch.ones(600, 16), torch.zeros(600, 1, dtype=torch.int64), torch.ones(600, 1)
    for N in (1, 1000):
        experts = torch.ones(N, 2, 16, dtype=torch.bfloat16, requires_grad=True)
        expert_mlp(x, indices, gates, experts, "relu", backend="cpu").sum().backward()
        assert torch.equal(experts.grad[0, 0], torch.full((16,), 16 * 600.0).bfloat16())
        assert torch.equal(experts.grad[0, 1], torch.full((16,), 16 * 600.0).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_round_to_nearest_even(dtype, kernels):
    """The gradient of one pair is a product that is exact in float32: its rounding is PyTorch's."""
    ties = [1 + n * 2.0**-bits for n in (1, 3) for bits in (8, 11)]  # half of the last bit
    odd = torch.tensor([*ties, 65504, 65519, 65520, 3e38, 0, 2**-14, 2**-15])
    values = torch.cat([torch.randn(4000), odd, -odd])
    for N, part in itertools.product((1, 9), (values, odd[:3], odd[4:])):
        experts = torch.ones(N, 2, len(part), dtype=dtype, requires_grad=True)
        x = torch.zeros(1, len(part))
        x[0, 0] = 1  # the pre-activation is 1, and the row that writes y learns from its gradient alone
        K = 4 if N == 1 else 1  # with gates 1, 0, 0, 0: many pairs an expert, or few
        y = expert_mlp(
            x, torch.zeros(1, K, dtype=torch.int64), torch.eye(1, K), experts, "relu", backend="cpu"
        )
        y.backward(part[None])
        assert torch.equal(experts.grad[0, 1], part.to(dtype))
