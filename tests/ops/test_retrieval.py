"""product_key_topk against a search through all n1 * n2 sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from million_experts.ops import product_key_topk, reference

FORWARD = torch.ops.million_experts.product_key_topk.default
BACKWARD = torch.ops.million_experts.product_key_topk_backward.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def all_scores(query: Tensor, keys1: Tensor, keys2: Tensor) -> Tensor:
    """[T, H, n1 * n2] in float64."""
    H = query.shape[1]
    query, keys1, keys2 = query.double(), keys1.double(), keys2.double()
    first = torch.einsum("thd,hnd->thn", query[:, :, 0], keys1.expand(H, *keys1.shape[-2:]))
    second = torch.einsum("thd,hnd->thn", query[:, :, 1], keys2.expand(H, *keys2.shape[-2:]))
    return (first[..., :, None] + second[..., None, :]).flatten(-2)


def brute_force(query: Tensor, keys1: Tensor, keys2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, indices = all_scores(query, keys1, keys2).sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], indices[..., :k]


def make_inputs(
    seed: int,
    T: int = 5,
    H: int = 3,
    n1: int = 7,
    n2: int = 6,
    d: int = 4,
    shared: bool = True,
    whole: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal numbers, or with `whole` small whole ones: their sums are exact and often equal."""
    generator = torch.Generator().manual_seed(seed)
    heads = () if shared else (H,)
    shapes = ((T, H, 2, d), (*heads, n1, d), (*heads, n2, d))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return tuple((t.round() if whole else t).to(dtype) for t in tensors)  # type: ignore[return-value]


def chosen_sub_keys(indices: Tensor, keys: Tensor, half: int, n2: int) -> Tensor:
    """[n] or [H, n], True where a sub-key was selected."""
    picks = indices // n2 if half == 0 else indices % n2
    chosen = torch.zeros(keys.shape[:-1], dtype=torch.bool)
    for head in range(indices.shape[1]):
        (chosen[head] if keys.dim() == 3 else chosen)[picks[:, head].flatten()] = True
    return chosen


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    n1, n2 = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    smaller = min(n1, n2)
    k = draw(st.one_of(st.integers(1, smaller), st.just(smaller)))
    inputs = make_inputs(
        draw(st.integers(0, 2**30)),
        T=draw(st.integers(0, 4)),
        H=draw(st.integers(1, 3)),
        n1=n1,
        n2=n2,
        d=draw(st.integers(1, 5)),
        shared=draw(st.booleans()),
        whole=draw(st.booleans()),
    )
    return inputs, k


@given(case=cases(), gaps=st.booleans())
def test_equals_search_through_all_experts(case, gaps, assert_close, spread_out, backend):
    inputs, k = case
    expected_scores, expected_indices = brute_force(*inputs, k)
    scores, indices = product_key_topk(*(spread_out(t) if gaps else t for t in inputs), k, backend=backend)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, expected_indices)  # whole numbers: of equal scores the lowest index first
    assert scores.dtype == torch.float64
    assert_close(scores, expected_scores)


@given(case=cases(), gaps=st.booleans())
def test_gradients_equal_those_of_the_search(case, gaps, assert_close, spread_out, backend):
    inputs, k = case
    weights = torch.randn(*inputs[0].shape[:2], k, dtype=torch.float64)
    naive = [t.clone().requires_grad_() for t in inputs]
    mine = [(spread_out(t) if gaps else t.clone()).requires_grad_() for t in inputs]
    scores, indices = product_key_topk(*mine, k, backend=backend)
    (all_scores(*naive).gather(-1, indices) * weights).sum().backward()
    (scores * weights).sum().backward()
    for a, b in zip(mine, naive, strict=True):
        assert_close(a.grad, b.grad)
    for half, keys in enumerate(mine[1:]):
        chosen = chosen_sub_keys(indices, keys, half, inputs[2].shape[-2])
        assert not keys.grad[~chosen].any()
        if not (inputs[0] == 0).any():  # the last whole-number query may be zero
            assert keys.grad[chosen].any(-1).all()


def test_ties_take_the_lowest_index_in_every_order(backend):
    # All scores are equal, in one head by zero keys and in the other by a zero query.
    query = torch.zeros(1, 2, 2, 1)
    query[0, 0] = 1
    keys = torch.zeros(2, 5, 1)
    keys[1] = torch.randn(5, 1)
    for k in range(1, 6):
        _, indices = product_key_topk(query, keys, keys, k, backend=backend)
        assert indices.tolist() == [[list(range(k))] * 2]


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)))
@pytest.mark.parametrize("shared", [True, False])
def test_dtypes_may_differ(dtypes, shared, assert_close, backend):
    inputs = [t.to(d) for t, d in zip(make_inputs(0, d=9, shared=shared), dtypes, strict=True)]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    naive = [t.detach().double().requires_grad_() for t in inputs]
    mine = [t.detach().clone().requires_grad_() for t in inputs]
    scores, indices = product_key_topk(*mine, 4, backend=backend)
    assert scores.dtype == wide
    assert indices.dtype == torch.int64
    assert_close(scores, brute_force(*naive, 4)[0])
    at_indices = all_scores(*naive).gather(-1, indices)
    assert_close(scores, at_indices)
    weights = torch.randn(scores.shape, dtype=wide)
    (scores * weights).sum().backward()
    (at_indices * weights).sum().backward()
    for a, b in zip(mine, naive, strict=True):
        assert a.grad.dtype == a.dtype
        assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [3, 6])  # 6 is the whole second codebook
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_query_that_is_not_finite_gives_valid_indices_and_harms_no_other(value, k, shared, backend):
    query, keys1, keys2 = make_inputs(1, shared=shared)
    scores, indices = product_key_topk(query, keys1, keys2, k, backend=backend)
    broken = query.clone()
    broken[1] = value
    broken[3, 0, 1, 2] = value
    broken_scores, broken_indices = product_key_topk(broken, keys1, keys2, k, backend=backend)
    assert ((broken_indices >= 0) & (broken_indices < 42)).all()
    assert not torch.isfinite(broken_scores[1]).all()
    assert not torch.isfinite(broken_scores[3, 0]).all()
    for t in (0, 2, 4):
        assert torch.equal(broken_scores[t], scores[t])
        assert torch.equal(broken_indices[t], indices[t])


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(shared, backend):
    query, keys1, keys2 = (
        t.requires_grad_() for t in make_inputs(2, T=3, H=2, n1=4, n2=5, d=3, shared=shared)
    )
    assert torch.autograd.gradcheck(
        lambda *t: product_key_topk(*t, 3, backend=backend)[0], (query, keys1, keys2)
    )


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradient_of_one_input_alone(wanted, backend):
    inputs = make_inputs(3)
    all_three = [t.clone().requires_grad_() for t in inputs]
    product_key_topk(*all_three, 4, backend=backend)[0].square().sum().backward()
    one = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    product_key_topk(*one, 4, backend=backend)[0].square().sum().backward()
    for a, b, wants in zip(one, all_three, wanted, strict=True):
        assert torch.equal(a.grad, b.grad) if wants else a.grad is None


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float64)])
def test_registration_is_sound(shared, transposed, dtypes, backend):
    inputs = [t.to(d) for t, d in zip(make_inputs(4, T=3, H=3, shared=shared), dtypes, strict=True)]
    if transposed:
        inputs[0] = inputs[0].transpose(0, 1)
    scores, indices = product_key_topk(*inputs, 4, backend=backend)
    opcheck(BACKWARD, (scores, indices, *inputs, backend))
    opcheck(FORWARD, (*(t.requires_grad_() for t in inputs), 4, backend))


def test_double_backward_is_refused(backend):
    query, keys1, keys2 = (t.requires_grad_() for t in make_inputs(5))
    scores, _ = product_key_topk(query, keys1, keys2, 2, backend=backend)
    (grad,) = torch.autograd.grad(scores.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"product_key_topk has no second derivative.*double backward"):
        grad.sum().backward()


def test_indices_have_no_gradient(backend):
    scores, indices = product_key_topk(*(t.requires_grad_() for t in make_inputs(5)), 2, backend=backend)
    assert scores.requires_grad
    assert not indices.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_does_not_narrow_the_scores(dtype, backend):
    inputs = make_inputs(9, d=20, dtype=dtype)
    expected = run_with_gradients(inputs, 3, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        results = run_with_gradients(inputs, 3, backend=backend)
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def run_with_gradients(inputs: tuple[Tensor, ...], k: int, **options) -> list[Tensor]:
    inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)
    scores, indices = product_key_topk(*inputs, k, **options)
    scores.square().sum().backward()
    return [scores.detach(), indices, *(t.grad for t in inputs)]


@pytest.mark.parametrize("shared", [True, False])
def test_the_same_bits_on_every_run_and_any_number_of_threads(shared, backend):
    inputs = make_inputs(6, T=200, H=4, n1=64, n2=64, d=16, shared=shared, dtype=torch.float32)
    first = run_with_gradients(inputs, 8, backend=backend)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for a, b in zip(run_with_gradients(inputs, 8, backend=backend), first, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_nothing(dtype, shared, monkeypatch):
    # Whole numbers, so that another order of summation cannot change a bit.
    inputs = make_inputs(7, T=11, whole=True, shared=shared, dtype=dtype)
    whole = run_with_gradients(inputs, 3, backend="reference")
    for size in (1, 3000):
        monkeypatch.setattr(reference, "SCRATCH_BYTES", size)
        for a, b in zip(run_with_gradients(inputs, 3, backend="reference"), whole, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_scratch_memory_is_bounded(measure_peaks, backend):
    assert reference.SCRATCH_BYTES == 64 * 2**20  # the promise; measured with 2 MiB, which is quicker
    # [T, H, n] has 32 MiB in float32, for each half.
    script = """
        from million_experts.ops import product_key_topk, reference
        reference.SCRATCH_BYTES = 2 * 2**20
        T, H, n, d, k = 1024, 8, 1024, 8, 4
        peaks = {}
        for dtype in (torch.bfloat16, torch.float64):
            query = torch.randn(T, H, 2, d).to(dtype).requires_grad_()
            keys = torch.randn(n, d).to(dtype).requires_grad_()
            run = lambda: product_key_topk(query, keys, keys, k, BACKEND)[0].sum()
            run().backward()  # whatever is set up once
            query.grad = keys.grad = None
            peaks[f"{dtype} forward"] = peak(run)
            peaks[f"{dtype} forward and backward"] = peak(lambda: run().backward())
            query.grad = keys.grad = None
    """
    peaks = measure_peaks(script.replace("BACKEND", repr(backend)))
    # 2 MiB, a few times the inputs and outputs (query 1 MiB in float64), and the allocator's own.
    for name, peak in peaks.items():
        assert peak < 16 * 2**20, f"{name}: {peak / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(5, 3, 8)}, r"query must have shape \[T, H, 2, d\], got \[5, 3, 8\]"),
        ({"query": torch.zeros(5, 3, 3, 4)}, r"query must have shape \[T, H, 2, d\], got \[5, 3, 3, 4\]"),
        ({"query": torch.zeros(5, 3, 2, 4, dtype=torch.int64)}, r"query must have a floating.*torch\.int64"),
        ({"keys1": torch.zeros(7, 4, dtype=torch.int32)}, r"keys1 must have a floating.*torch\.int32"),
        ({"keys2": torch.zeros(6, 4, dtype=torch.bool)}, r"keys2 must have a floating.*torch\.bool"),
        (
            {"keys1": torch.zeros(7, 5)},
            r"keys1 must have shape \[n, 4\] or \[3, n, 4\] to fit query \[5, 3, 2, 4\], got \[7, 5\]",
        ),
        ({"keys2": torch.zeros(4)}, r"keys2 must have shape .*, got \[4\]"),
        ({"keys2": torch.zeros(2, 6, 4)}, r"keys2 must have shape .*\[3, n, 4\].*, got \[2, 6, 4\]"),
        (
            {"keys1": torch.zeros(3, 7, 4)},
            r"keys1 and keys2 must both be shared or both be per head, got \[3, 7, 4\] and \[6, 4\]",
        ),
        ({"k": 0}, r"k must lie in \[1, 6\], the size of the smaller codebook, got 0"),
        ({"k": 7}, r"k must lie in \[1, 6\], the size of the smaller codebook, got 7"),
        ({"backend": "cuda"}, r"backend must be one of 'auto', .*, got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    query, keys1, keys2 = make_inputs(8)
    good = {"query": query, "keys1": keys1, "keys2": keys2, "k": 2}
    with pytest.raises(ValueError, match=message):
        product_key_topk(**(good | change))
