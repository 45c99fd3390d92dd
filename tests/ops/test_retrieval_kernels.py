"""product_key_topk by the C++ kernels against the reference, every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from million_experts.ops import product_key_topk

Inputs = tuple[Tensor, Tensor, Tensor]
# (n1, n2, k): codebooks that no vector (4 to 16 numbers) and no panel (8 to 64) divides, and that all divide;
# with few and many candidates for each winner; k of one, and of the whole codebook.
SIZES = [
    (1, 1, 1), (2, 3, 2), (5, 3, 3), (16, 16, 16), (17, 15, 4), (31, 33, 1), (64, 64, 16), (63, 65, 63),
    (100, 37, 30), (128, 129, 128), (300, 301, 16), (300, 300, 300), (1024, 1000, 16), (2000, 1999, 32),
    (2000, 50, 50), (1500, 1500, 200),
]  # fmt: skip


def make_inputs(
    seed: int, T: int, H: int, n1: int, n2: int, d: int, shared: bool, whole: bool, dtype=torch.float32
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    heads = () if shared else (H,)
    tensors = [torch.randn(s, generator=generator) for s in ((T, H, 2, d), (*heads, n1, d), (*heads, n2, d))]
    return tuple((t.round() if whole else t).to(dtype) for t in tensors)  # type: ignore[return-value]


def step(inputs: Inputs, k: int, backend: str, weights: Tensor) -> list[Tensor]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    scores, indices = product_key_topk(*inputs, k, backend)
    (scores * weights.to(scores.dtype)).sum().backward()
    return [indices, scores.detach(), *(t.grad for t in inputs)]


def check_whole(inputs: Inputs, k: int, assert_close, spread=lambda t: t) -> None:
    """Whole numbers: their sums are exact, so every tie is one, and the winners must be the same."""
    weights = torch.randn(*inputs[0].shape[:2], k, dtype=torch.float64)
    expected = step(tuple(t.double() for t in inputs), k, "reference", weights)
    actual = step(tuple(map(spread, inputs)), k, "cpu", weights)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1].double(), expected[1])
    for gradient, right, tensor in zip(actual[2:], expected[2:], inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_close(gradient, right)


# Sums of large numbers and tiny ones: different pairs round to the same score, among them pairs that are not
# looked at because they cannot be better than k others.
@pytest.mark.parametrize(("n1", "n2", "k"), [(2, 2, 2), (9, 7, 3), (40, 33, 16), (130, 20, 7)])
@pytest.mark.parametrize("step", [2.0**-23, 2.0**-24, 2.0**-25])
def test_sums_that_round_to_the_same_score(n1, n2, k, step, kernels):
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        keys1, keys2 = (1 + step * torch.randint(0, 9, (n, 1), generator=generator) for n in (n1, n2))
        query = torch.ones(4, 1, 2, 1)
        scores, indices = product_key_topk(query, keys1, keys2, k, "cpu")
        expected = product_key_topk(query, keys1, keys2, k, "reference")
        assert torch.equal(scores, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_ties_as_in_the_reference(sizes, shared, kernels, assert_close):
    n1, n2, k = sizes
    for d, dtype in itertools.product((1, 7, 32), (torch.float32, torch.float64)):
        check_whole(make_inputs(d, 5, 3, n1, n2, d, shared, True, dtype), k, assert_close)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_scores_are_the_largest_there_are(sizes, shared, kernels, assert_close):
    n1, n2, k = sizes
    for T, d in ((3, 64), (7, 3)):
        inputs = make_inputs(d, T, 2, n1, n2, d, shared, False)
        expected, _ = product_key_topk(*(t.double() for t in inputs), k, "reference")
        scores, indices = product_key_topk(*inputs, k, "cpu")
        assert_close(scores, expected)
        assert (scores[..., :-1] >= scores[..., 1:]).all()
        check_valid(indices, n1 * n2)
        i, j = indices // n2, indices % n2
        query, keys1, keys2 = (t.double() for t in inputs)
        if shared:
            keys1, keys2 = (t.expand(2, *t.shape) for t in (keys1, keys2))
        rows = torch.arange(2)[:, None]
        at = torch.einsum("thd,thkd->thk", query[:, :, 0], keys1[rows, i])
        at += torch.einsum("thd,thkd->thk", query[:, :, 1], keys2[rows, j])
        assert_close(scores, at)


def check_valid(indices: Tensor, N: int) -> None:
    assert ((indices >= 0) & (indices < N)).all()
    ordered = indices.sort(-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Inputs, int]:
    n1, n2 = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    k = draw(st.integers(1, min(n1, n2)))
    inputs = make_inputs(
        draw(st.integers(0, 2**30)),
        T=draw(st.integers(0, 9)),
        H=draw(st.integers(1, 4)),
        n1=n1,
        n2=n2,
        d=draw(st.sampled_from([1, 2, 5, 16, 33])),
        shared=draw(st.booleans()),
        whole=True,
    )
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    return tuple(t.to(draw(dtypes)) for t in inputs), k  # type: ignore[return-value]


@given(case=cases(), gaps=st.booleans())
def test_agrees_with_the_reference(case, gaps, kernels, assert_close, spread_out):
    check_whole(*case, assert_close, spread_out if gaps else lambda t: t)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [1, 16, 63, 500])
def test_all_scores_equal(shared, n, kernels):
    query, keys1, keys2 = make_inputs(0, 3, 2, n, n, 4, shared, False)
    for k in {1, min(n, 5), n}:
        for q, k1, k2 in ((query * 0, keys1, keys2), (query, keys1 * 0, keys2 * 0)):
            scores, indices = product_key_topk(q, k1, k2, k, "cpu")
            assert not scores.any()
            assert torch.equal(indices, torch.arange(k).expand(3, 2, k))


@pytest.mark.parametrize("n", [16, 40, 700])
@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_sub_key_that_is_not_finite(n, k, half, value, kernels):
    """Its score is NaN, which counts as the largest, or infinite: the winners are the reference's."""
    inputs = [t.abs() + 1 for t in make_inputs(1, 4, 2, n, n + 1, 3, True, True)]
    inputs[1 + half][n - 3] = value
    scores, indices = product_key_topk(*inputs, k, "cpu")
    expected, right = product_key_topk(*inputs, k, "reference")
    assert torch.equal(indices, right)
    assert torch.equal(scores.nan_to_num(0, 1e30, -1e30), expected.nan_to_num(0, 1e30, -1e30))
    if value != float("-inf"):
        assert ((indices // (n + 1), indices % (n + 1))[half] == n - 3).all()


@pytest.mark.parametrize("n", [3, 40, 700])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_many_values_that_are_not_finite_give_valid_indices(n, value, kernels):
    for fraction, k in itertools.product((0.01, 0.5, 1.0), (1, 3, min(n, 33))):
        query, keys1, keys2 = make_inputs(2, 4, 2, n, n, 3, False, False)
        for t in (keys1, keys2):
            t[torch.rand(t.shape, generator=torch.Generator().manual_seed(k)) < fraction] = value
        _, indices = product_key_topk(query, keys1, keys2, k, "cpu")
        check_valid(indices, n * n)
        clean = make_inputs(2, 4, 2, n, n, 3, False, False)[1:]
        broken, (expected, right) = query.clone(), product_key_topk(query, *clean, k, "cpu")
        broken[1] = value
        broken[3, 1, 1, 2] = -value
        scores, indices = product_key_topk(broken, *clean, k, "cpu")
        check_valid(indices, n * n)
        for t in (0, 2):
            assert torch.equal(indices[t], right[t])
            assert torch.equal(scores[t], expected[t])


def test_scores_of_every_magnitude(kernels, assert_close):
    # Bisection between the largest and the smallest score has to find a threshold among powers of two.
    for exponents in (
        torch.arange(-120, 120),
        torch.arange(-1, 200) * 0.01,
        torch.cat([torch.zeros(300), torch.ones(1)]),
    ):
        keys = torch.exp2(exponents.float())[torch.randperm(len(exponents))][:, None]
        for sign, k in itertools.product((1.0, -1.0), (1, 7, 33, len(keys))):
            query = torch.full((1, 1, 2, 1), sign)
            expected = product_key_topk(query.double(), keys.double(), keys.double(), k, "reference")[0]
            scores, indices = product_key_topk(query, keys, keys, k, "cpu")
            assert_close(scores, expected)
            check_valid(indices, len(keys) ** 2)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_many_queries(shared, kernels, assert_close):
    # From 512 queries on, parts of them sum into tables of their own.
    for T in (255, 511, 513, 1100):
        inputs = make_inputs(3, T, 2, 40, 30, 9, shared, True)
        check_whole(inputs, 5, assert_close)
