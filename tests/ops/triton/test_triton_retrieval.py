"""product_key_topk by the Triton kernels, in Triton's interpreter, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from million_experts.ops import reference

pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl
import triton_interpreter

from million_experts.ops import triton_retrieval as kernels

triton_interpreter.repair()

NARROW = (torch.bfloat16, torch.float16, torch.float32)
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True, scope="module")
def quick_sorts():
    with pytest.MonkeyPatch.context() as patch:
        for name, function in triton_interpreter.QUICK_SORTS.items():
            patch.setattr(tl, name, function)
        yield patch


def make_inputs(
    seed: int, T=3, H=2, n1=7, n2=6, d=4, shared=True, whole=False, dtype=torch.float32
) -> Inputs:
    """Normal numbers, or with `whole` small whole ones: their sums are exact and often equal."""
    generator = torch.Generator().manual_seed(seed)
    heads = () if shared else (H,)
    shapes = ((T, H, 2, d), (*heads, n1, d), (*heads, n2, d))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return tuple((t.round() if whole else t).to(dtype) for t in tensors)  # type: ignore[return-value]


def check_forward(inputs: Inputs, k: int, assert_close, exact: bool = False) -> Tensor:
    scores, indices = kernels.product_key_topk(*inputs, k)
    expected, right = reference.product_key_topk(*inputs, k)
    assert scores.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert torch.equal(indices, right)
    if exact:
        assert torch.equal(scores, expected)
    assert_close(scores, expected)
    return indices


def check_backward(inputs: Inputs, indices: Tensor, assert_close, exact: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(indices.shape, generator=generator)
    grad = grad.round() if exact else grad
    results = kernels.product_key_topk_backward(grad, indices, *inputs)
    expected = reference.product_key_topk_backward(grad, indices, *inputs)
    for a, b, like in zip(results, expected, inputs, strict=True):
        assert a.dtype == like.dtype
        assert torch.equal(a, b) if exact else True
        assert_close(a, b)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Inputs, int, bool]:
    n1, n2 = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    whole = draw(st.booleans())
    inputs = make_inputs(
        draw(st.integers(0, 2**30)),
        T=draw(st.integers(0, 4)),
        H=draw(st.integers(1, 3)),
        n1=n1,
        n2=n2,
        d=draw(st.integers(1, 5)),
        shared=draw(st.booleans()),
        whole=whole,
        dtype=draw(st.sampled_from(NARROW)) if whole else torch.float32,
    )
    return inputs, draw(st.one_of(st.integers(1, min(n1, n2)), st.just(min(n1, n2)))), whole


@settings(max_examples=25)
@given(case=cases(), gaps=st.booleans())
def test_equals_the_reference(case, gaps, assert_close, spread_out):
    inputs, k, whole = case
    if gaps:
        inputs = tuple(spread_out(t) for t in inputs)
    indices = check_forward(inputs, k, assert_close, exact=whole)
    check_backward(inputs, indices, assert_close, exact=whole)


# Codebooks of several tiles, tiles that are not full, depths of several tiles, many winners.
SIZES = [(130, 70, 4, 5), (65, 33, 150, 16), (70, 100, 2, 64), (3, 200, 16, 3)]


@pytest.mark.parametrize(("n1", "n2", "d", "k"), SIZES)
@pytest.mark.parametrize("shared", [True, False])
def test_codebooks_of_several_tiles(n1, n2, d, k, shared, assert_close):
    inputs = make_inputs(0, 3, 2, n1, n2, d, shared, whole=True)
    indices = check_forward(inputs, k, assert_close, exact=True)
    check_backward(inputs, indices, assert_close, exact=True)


def test_sorting_by_the_language_itself(quick_sorts, assert_close):
    with pytest.MonkeyPatch.context() as patch:
        for name in triton_interpreter.QUICK_SORTS:
            patch.setattr(tl, name, getattr(tl.standard, name))
        check_forward(make_inputs(3, 2, 1, 70, 66, 5, whole=True), 5, assert_close, exact=True)
        check_forward(make_inputs(4, 1, 2, 9, 8, 3), 8, assert_close)
        for k in (16, 33, 64):
            check_forward(make_inputs(k, 1, 1, 130, 65, 3, whole=True), k, assert_close, exact=True)


def test_queries_of_several_tiles(assert_close):
    for shared in (True, False):
        inputs = make_inputs(1, 35, 2, 9, 10, 3, shared)
        indices = check_forward(inputs, 4, assert_close)
        check_backward(inputs, indices, assert_close)


@pytest.mark.parametrize("dtypes", list(itertools.product(NARROW, repeat=3)))
def test_dtypes_may_differ(dtypes, assert_close):
    inputs = tuple(t.to(d) for t, d in zip(make_inputs(2, d=9), dtypes, strict=True))
    indices = check_forward(inputs, 4, assert_close)
    check_backward(inputs, indices, assert_close)


def test_ties_take_the_lowest_index():
    query = torch.zeros(1, 2, 2, 1)
    query[0, 0] = 1
    keys = torch.zeros(2, 5, 1)
    keys[1] = torch.randn(5, 1)
    for k in (1, 3, 5):
        _, indices = kernels.product_key_topk(query, keys, keys, k)
        assert indices.tolist() == [[list(range(k))] * 2]
    negative = -torch.zeros(3, 1)  # -0.0 equals 0.0
    keys = torch.tensor([[0.0], [-0.0], [0.0]])
    scores, indices = kernels.product_key_topk(torch.ones(1, 1, 2, 1), keys, negative, 3)
    assert indices.tolist() == [[[0, 1, 2]]]
    assert not scores.any()


def test_sums_that_round_to_the_same_take_the_lowest_index(assert_close):
    # Beside 2**24 a float32 has no room for 1: pairs that cannot win by rank tie with the winners.
    generator = torch.Generator().manual_seed(0)
    query = torch.ones(1, 1, 2, 1)
    for _ in range(6):
        keys1 = 2.0**24 + torch.randint(0, 3, (9, 1), generator=generator)
        keys2 = torch.randint(-4, 4, (8, 1), generator=generator) / 2
        for k in (2, 5, 8):
            check_forward((query, keys1, keys2), k, assert_close, exact=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shared", [True, False])
def test_query_that_is_not_finite_gives_valid_indices_and_harms_no_other(value, shared):
    query, keys1, keys2 = make_inputs(1, T=5, H=3, shared=shared)
    for k in (3, 6):
        scores, indices = kernels.product_key_topk(query, keys1, keys2, k)
        broken = query.clone()
        broken[1] = value
        broken[3, 0, 1, 2] = value
        broken_scores, broken_indices = kernels.product_key_topk(broken, keys1, keys2, k)
        assert ((broken_indices >= 0) & (broken_indices < 42)).all()
        assert not torch.isfinite(broken_scores[1]).all()
        assert not torch.isfinite(broken_scores[3, 0]).all()
        for t in (0, 2, 4):
            assert torch.equal(broken_scores[t], scores[t])
            assert torch.equal(broken_indices[t], indices[t])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("half", [0, 1])
def test_a_sub_key_that_is_not_finite(value, half):
    for n, k in ((9, 1), (9, 4), (70, 5)):
        inputs = [t.abs() + 1 for t in make_inputs(1, 2, 2, n, n + 1, 3, whole=True)]
        inputs[1 + half][n - 3] = value
        scores, indices = kernels.product_key_topk(*inputs, k)
        expected, right = reference.product_key_topk(*inputs, k)
        assert torch.equal(indices, right)
        assert torch.equal(scores.nan_to_num(0, 1e30, -1e30), expected.nan_to_num(0, 1e30, -1e30))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_many_values_that_are_not_finite_give_valid_indices(value):
    for fraction, k in ((0.1, 3), (1.0, 9)):
        query, keys1, keys2 = make_inputs(2, 2, 2, 9, 9, 3)
        for t in (keys1, keys2):
            t[torch.rand(t.shape, generator=torch.Generator().manual_seed(k)) < fraction] = value
        _, indices = kernels.product_key_topk(query, keys1, keys2, k)
        assert ((indices >= 0) & (indices < 81)).all()
        assert all(len(set(row)) == k for row in indices.flatten(0, 1).tolist())


@pytest.mark.parametrize(("T", "H"), [(0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_no_queries(T, H, shared, assert_close):
    inputs = make_inputs(0, T=T, H=H, shared=shared)
    assert check_forward(inputs, 3, assert_close).shape == (T, H, 3)
    grads = kernels.product_key_topk_backward(torch.zeros(T, H, 3), torch.zeros(T, H, 3).long(), *inputs)
    for grad, like in zip(grads, inputs, strict=True):
        assert grad.shape == like.shape
        assert not grad.any()


@pytest.mark.parametrize("part", [1, 4, 40])
@pytest.mark.parametrize("shared", [True, False])
def test_parts_of_a_sub_keys_selections_change_nothing(part, shared, monkeypatch, assert_close):
    monkeypatch.setattr(kernels, "PART", part)
    inputs = make_inputs(4, T=30, H=2, n1=3, n2=5, shared=shared, whole=True)
    inputs[1][..., 1, :] *= 9  # chosen by most
    indices = reference.product_key_topk(*inputs, 2)[1]
    check_backward(inputs, indices, assert_close, exact=True)


def test_autotuning_chooses_no_sizes_and_runs_repeat():
    # Warps and stages mean nothing to the interpreter: `tests/gpu` compares the bits that they give.
    assert all(not config.kwargs for config in kernels.TOPK_CONFIGS)
    inputs = make_inputs(5, T=5, n1=70, n2=40, d=20)
    scores, indices = kernels.product_key_topk(*inputs, 6)
    grads = [kernels.product_key_topk_backward(scores, indices, *inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_offsets_beyond_32_bits(assert_close):
    # Two tokens 2**31 numbers apart.
    near = make_inputs(6, T=2, H=1, d=8, dtype=torch.bfloat16)
    far = triton_interpreter.addressed((2**31 + 16,), torch.bfloat16)
    query = far.as_strided((2, 1, 2, 8), (2**31, 0, 8, 1))
    query.copy_(near[0])
    indices = check_forward((query, *near[1:]), 3, assert_close)
    check_backward((query, *near[1:]), indices, assert_close)


def test_the_last_of_many_codebooks(assert_close):
    """Its sub-keys lie beyond 2**31 numbers: of all heads' programs only those of the last run."""
    H, n, d, k = 2**16 + 1, 2**8, 2**7, 3
    near = make_inputs(7, T=2, H=1, n1=n, n2=n, d=d, shared=False, dtype=torch.bfloat16)
    query = near[0].expand(2, H, 2, d)
    keys = [triton_interpreter.addressed((H, n, d), torch.bfloat16) for _ in range(2)]
    for many, one in zip(keys, near[1:], strict=True):
        many[-1] = one[0]
    scores = triton_interpreter.addressed((2, H, k), torch.float32)
    indices = triton_interpreter.addressed((2, H, k), torch.int64)
    with triton_interpreter.programs_from(0, H - 1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "topk_kernel", {(1, H): kernels.topk_kernel[1, 1]})
        patch.setattr(query, "new_empty", lambda *_, dtype: scores if dtype == torch.float32 else indices)
        kernels.product_key_topk(query, *keys, k)
    expected, right = reference.product_key_topk(*near, k)
    assert torch.equal(indices[:, -1], right[:, 0])
    assert_close(scores[:, -1], expected[:, 0])
    assert not scores[:, :-1].any()


@pytest.mark.parametrize("what", ["float64", "winners", "experts"])
def test_what_the_kernels_do_not_take_goes_to_the_reference(what, monkeypatch, assert_close):
    inputs = make_inputs(0, n1=4, n2=4, d=2, whole=True)
    if what == "float64":
        inputs = (inputs[0].double(), *inputs[1:])
    monkeypatch.setattr(kernels, "MOST_K", 1 if what == "winners" else 64)
    monkeypatch.setattr(kernels, "MOST_EXPERTS", 16 if what == "experts" else 2**31)
    monkeypatch.setattr(kernels, "topk_kernel", None)
    monkeypatch.setattr(kernels, "query_grad_kernel", None)
    scores, indices = kernels.product_key_topk(*inputs, 2)
    assert torch.equal(indices, reference.product_key_topk(*inputs, 2)[1])
    grads = kernels.product_key_topk_backward(scores, indices, *inputs)
    assert grads[0].dtype == inputs[0].dtype
