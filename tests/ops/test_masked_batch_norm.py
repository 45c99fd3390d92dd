"""masked_batch_norm against batch normalisation written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from million_experts.ops import masked_batch_norm

FORWARD = torch.ops.million_experts.masked_batch_norm.default
BACKWARD = torch.ops.million_experts.masked_batch_norm_backward.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A block has 4 vectors of 4 to 16 numbers.
CHANNELS = (1, 3, 15, 16, 17, 63, 64, 65, 130, 1024)

Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor]


def make_inputs(
    seed: int, T: int, C: int, masked: bool, dtypes=(torch.float32,) * 2, mean: float = 1.0
) -> Inputs:
    """x, mask, weight, bias; `dtypes` are those of x and of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, C, generator=generator, dtype=torch.float64) * 2 + mean
    weight, bias = torch.randn(2, C, generator=generator, dtype=torch.float64)
    mask = torch.rand(T, generator=generator) > 0.4
    mask[:2] = True
    return x.to(dtypes[0]), mask if masked else None, weight.to(dtypes[1]), bias.to(dtypes[1])


def naive(x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    real = x if mask is None else x[mask]
    mean, variance = real.mean(0), real.var(0, correction=0)
    y = torch.zeros_like(x)
    rows = (real - mean) / torch.sqrt(variance + eps) * weight + bias
    return (rows if mask is None else y.index_put((mask,), rows)), mean, variance


def step(function, inputs: Inputs, grad_y: Tensor, eps: float, **options) -> list[Tensor]:
    x, mask, weight, bias = inputs
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y, mean, variance = function(x, mask, weight, bias, eps, **options)
    y.backward(grad_y.to(y.dtype))
    return [t.detach() for t in (y, mean, variance, x.grad, weight.grad, bias.grad)]


def check(inputs: Inputs, backend: str, assert_close, eps: float = 1e-5, spread=lambda t: t) -> None:
    x, mask, weight, bias = inputs
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    wide = (x.double(), mask, weight.double(), bias.double())
    expected = step(naive, wide, grad_y.double(), eps)
    x = x.clone()
    if mask is not None:
        x[~mask] = float("nan")
        grad_y[~mask] = float("inf")
    spaced = (spread(x), None if mask is None else spread(mask), spread(weight), spread(bias))
    actual = step(masked_batch_norm, spaced, spread(grad_y), eps, backend=backend)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtypes = [sums] * 3 + [x.dtype, weight.dtype, weight.dtype]
    for result, right, dtype in zip(actual, expected, dtypes, strict=True):
        assert result.dtype == dtype
        if right is expected[3]:
            # With few tokens the terms of x's gradient cancel, all of it with two: add one term's size.
            size = (grad_y if mask is None else grad_y[mask]).abs().max()
            size = size * (wide[2].abs() * torch.rsqrt(expected[2] + eps)).amax(0)
            result, right = result.double() + size, right + size
        assert_close(result, right, torch.float32 if dtype == torch.float64 != x.dtype else dtype)
    if mask is not None:
        assert not actual[0][~mask].any()
        assert not actual[3][~mask].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("C", CHANNELS)
def test_every_number_of_channels(masked, C, backend, assert_close):
    for T in (2, 3, 127, 128, 129, 300):  # sums are taken of runs of 128
        check(make_inputs(T, T, C, masked), backend, assert_close)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("of_x", DTYPES)
@pytest.mark.parametrize("of_parameters", DTYPES)
def test_dtypes_may_differ(masked, of_x, of_parameters, backend, assert_close):
    check(make_inputs(0, 40, 19, masked, (of_x, of_parameters)), backend, assert_close)


@given(
    seed=st.integers(0, 2**30),
    T=st.integers(2, 60),
    C=st.integers(1, 70),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
    gaps=st.booleans(),
)
def test_is_batch_norm_of_the_real_tokens(
    seed, T, C, masked, dtype, eps, gaps, backend, assert_close, spread_out
):
    def spread(t):
        return spread_out(t) if gaps and t.is_floating_point() else t

    inputs = make_inputs(seed, T, C, masked, (dtype, torch.float32))
    if T > 2 or not masked:
        check(inputs, backend, assert_close, eps, spread)


@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_far_from_zero_costs_no_variance(masked, backend):
    # E[x^2] - E[x]^2 would have lost every digit of a variance of 4.
    inputs = make_inputs(2, 5000, 20, masked, mean=1e4)
    expected = naive(*(t if t is None or t.dtype == torch.bool else t.double() for t in inputs), 1e-5)[2]
    variance = masked_batch_norm(*inputs, backend=backend)[2]
    assert ((variance - expected) / expected).abs().max() < 1e-5


def test_equal_tokens_give_the_bias(backend):
    x, bias = torch.full((9, 7), 3.0), torch.randn(7)
    y, mean, variance = masked_batch_norm(x, None, torch.ones(7), bias, backend=backend)
    assert torch.equal(y, bias.expand(9, 7))
    assert torch.equal(mean, x[0])
    assert not variance.any()


def test_a_channel_that_is_not_finite_harms_no_other(backend):
    inputs = make_inputs(3, 30, 40, True)
    clean = masked_batch_norm(*inputs, backend=backend)
    inputs[0][0, 17] = float("nan")
    inputs[0][1, 30] = float("inf")
    broken = masked_batch_norm(*inputs, backend=backend)
    others = torch.ones(40, dtype=torch.bool)
    others[[17, 30]] = False
    for a, b in zip(broken, clean, strict=True):
        assert torch.equal(a[..., others], b[..., others])
    assert not torch.isfinite(broken[0][inputs[1]][:, ~others]).any()


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked, backend):
    x, mask, weight, bias = make_inputs(4, 6, 3, masked, (torch.float64,) * 2)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: masked_batch_norm(x, mask, weight, bias, 1e-3, backend)[0], tensors
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
)
def test_registration_is_sound(masked, dtypes, backend):
    x, mask, weight, bias = make_inputs(5, 6, 5, masked, dtypes)
    x = x.t().contiguous().t()
    y, mean, variance = FORWARD(x, mask, weight, bias, 1e-5, backend)
    opcheck(BACKWARD, (y, x, mask, weight, mean, variance, 1e-5, backend))
    for t in (x, weight, bias):
        t.requires_grad_()
    opcheck(FORWARD, (x, mask, weight, bias, 1e-5, backend))


def test_double_backward_is_refused(backend):
    x, mask, weight, bias = make_inputs(6, 6, 3, True)
    y = masked_batch_norm(x.requires_grad_(), mask, weight, bias, backend=backend)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"masked_batch_norm has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6)}, r"x must have shape \[T, C\], got \[6\]"),
        (
            {"x": torch.zeros(6, 3, dtype=torch.int64)},
            r"x must have a floating-point dtype, got torch\.int64",
        ),
        ({"weight": torch.zeros(4)}, r"weight must have shape \[3\] to fit x, got \[4\]"),
        ({"bias": torch.zeros(3, 1)}, r"bias must have shape \[3\] to fit x, got \[3, 1\]"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask must be bool of shape \[6\].*torch\.bool \[5\]"),
        ({"mask": torch.ones(6)}, r"mask must be bool of shape \[6\].*torch\.float32 \[6\]"),
        ({"backend": "cuda"}, r"backend must be one of 'auto', .*, got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    x, mask, weight, bias = make_inputs(7, 6, 3, True)
    good = {"x": x, "mask": mask, "weight": weight, "bias": bias}
    with pytest.raises(ValueError, match=message):
        masked_batch_norm(**(good | change))
