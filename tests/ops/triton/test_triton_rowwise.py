"""rowwise_adamw as a Triton kernel, in Triton's interpreter, against the reference: the same bits."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from million_experts.ops import reference_rowwise
from rowwise_cases import exact_sqrt, make_gradient, make_state

pytest.importorskip("triton", reason="Triton is not installed")
import triton_interpreter

from million_experts.ops import triton_rowwise as kernels

triton_interpreter.repair()

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)

WITHOUT_MOMENTUM = OPTIONS | {"betas": (0.0, 0.99)}


def run_both(state, rows=None, values=None, places=None, starts=None, key=None, options=OPTIONS):
    """The state after a step by the kernel, and by the reference."""
    results = []
    for run in (kernels.rowwise_adamw, reference_rowwise.rowwise_adamw):
        own = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in state.items()}
        with mock.patch.object(torch.Tensor, "sqrt", exact_sqrt):
            run(**own, rows=rows, values=values, places=places, starts=starts, **options, key=key)
        results.append(own)
    return results


def assert_same(results, assert_close, by_row=False):
    ours, theirs = results
    for name in ("table", "exp_avg", "exp_avg_sq", "last_step"):
        if theirs[name] is None:
            assert ours[name] is None
        elif by_row and name != "last_step":
            assert_close(ours[name], theirs[name])
        else:
            assert torch.equal(ours[name], theirs[name]), name


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def steps(draw: st.DrawFn):
    N, R, D = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    by_row = draw(st.booleans())
    seed = draw(st.integers(0, 2**30))
    momentum = draw(st.sampled_from((*DTYPES[:2], None)))
    state = make_state(seed, N, R, D, draw(st.sampled_from(DTYPES)), momentum, by_row)
    touched, dtype = draw(st.integers(0, N)), draw(st.sampled_from(DTYPES))
    gradient = make_gradient(seed, N, R, D, touched, dtype, draw(st.booleans()))
    key = draw(st.one_of(st.none(), st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])))
    options = WITHOUT_MOMENTUM if momentum is None else OPTIONS
    return state, gradient, key, options, by_row


@settings(max_examples=60)
@given(steps())
def test_a_step_has_the_bits_of_the_reference(assert_close, step):
    state, gradient, key, options, by_row = step
    assert_same(run_both(state, **gradient, key=key, options=options), assert_close, by_row)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("momentum", [torch.bfloat16, None])
@pytest.mark.parametrize("key", [None, 2**63 + 5])
def test_all_rows_catch_up(by_row, momentum, key, assert_close):
    state = make_state(3, N=7, D=5, table=torch.bfloat16, momentum=momentum, by_row=by_row)
    state["last_step"][2] = state["step"]  # nothing missed
    before = state["table"][2].clone()
    options = WITHOUT_MOMENTUM if momentum is None else OPTIONS
    results = run_both(state, key=key, options=options)
    assert_same(results, assert_close)
    assert torch.equal(results[0]["table"][2], before)
    assert (results[0]["last_step"] == state["step"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype, assert_close):
    state = make_state(4, table=dtype, momentum=dtype)
    values = torch.randn(3, 2, 6)
    values[0, 0, 1], values[1, 1, 2] = float("nan"), float("inf")
    state["table"][4, 0, 0] = float("-inf")
    ours, theirs = run_both(state, torch.tensor([1, 3, 4]), values, key=7)
    for name in ("table", "exp_avg", "exp_avg_sq"):
        assert torch.equal(ours[name].isnan(), theirs[name].isnan())
        assert torch.equal(ours[name].nan_to_num(0), theirs[name].nan_to_num(0))


@pytest.mark.parametrize("D", [1, 257, 1030, 1500])  # 3 * 1,500 numbers take two pieces
def test_wide_rows(D, assert_close):
    state = make_state(5, N=3, R=3, D=D, table=torch.bfloat16)
    assert_same(run_both(state, torch.tensor([2, 0]), torch.randn(2, 3, D), key=9), assert_close)
    state = make_state(6, N=3, R=3, D=D, by_row=True)
    assert_same(run_both(state, torch.tensor([2, 0]), torch.randn(2, 3, D)), assert_close, by_row=True)


@pytest.mark.parametrize("shape", [(0, 2, 3), (3, 2, 0), (3, 0, 2)])
def test_nothing_to_do(shape, assert_close):
    state = make_state(7, *shape)
    assert_same(run_both(state), assert_close)
    if shape[0]:
        none = torch.zeros(0, dtype=torch.int64)
        assert_same(run_both(state, none, torch.zeros(0, *shape[1:])), assert_close)
        assert_same(run_both(state, torch.tensor([1]), torch.zeros(1, *shape[1:])), assert_close)


def test_offsets_beyond_32_bits():
    small = make_state(8, N=2, R=2, D=1024, table=torch.bfloat16, momentum=torch.bfloat16, by_row=True)
    N = 2**20 + 3
    large = small | {
        "table": triton_interpreter.addressed((N, 2, 1024), torch.bfloat16),
        "exp_avg": triton_interpreter.addressed((N, 2, 1024), torch.bfloat16),
        "exp_avg_sq": torch.zeros(N, 2),
        "last_step": torch.zeros(N, dtype=torch.int32),
    }
    for name in ("table", "exp_avg", "exp_avg_sq", "last_step"):
        large[name][N - 1] = small[name][1]
    values = torch.randn(1, 2, 1024)
    for state, row in ((small, 1), (large, N - 1)):
        kernels.rowwise_adamw(
            **state, rows=torch.tensor([row]), values=values, places=None, starts=None, **OPTIONS, key=None
        )
    for name in ("table", "exp_avg", "exp_avg_sq", "last_step"):
        assert torch.equal(large[name][N - 1], small[name][1])


def test_gradients_beyond_32_bits():
    state = make_state(12, N=2, R=2, D=1024, table=torch.bfloat16)
    near = torch.randn(2, 2, 1024).bfloat16()
    far = triton_interpreter.addressed((2**20 + 3, 2, 1024), torch.bfloat16)
    far[-2:] = near
    rows, starts = torch.tensor([1]), torch.tensor([0, 2])
    expected, _ = run_both(state, rows, near, torch.tensor([0, 1]), starts)
    kernels.rowwise_adamw(
        **state, rows=rows, values=far, places=torch.tensor([len(far) - 2, len(far) - 1]), starts=starts,
        **OPTIONS, key=None,
    )  # fmt: skip
    assert torch.equal(state["table"], expected["table"])


def test_the_same_bits_on_every_run():
    state = make_state(9, table=torch.bfloat16, momentum=torch.bfloat16)
    values = torch.randn(5, 2, 6)
    first, again = (run_both(state, torch.arange(5), values, key=3)[0] for _ in range(2))
    assert torch.equal(first["table"], again["table"])
    other = run_both(state, torch.arange(5), values, key=4)[0]
    assert not torch.equal(first["table"], other["table"])


def test_float64_and_very_wide_rows_go_to_the_reference(monkeypatch, assert_close):
    monkeypatch.setattr(kernels, "adamw_kernel", None)
    state = make_state(10)
    for name in ("table", "exp_avg", "exp_avg_sq"):
        state[name] = state[name].double()
    values = torch.randn(1, 2, 6, dtype=torch.float64)
    assert_same(run_both(state, torch.tensor([1]), values), assert_close)
    monkeypatch.setattr(kernels, "MOST_D", 5)
    assert_same(run_both(make_state(11), torch.tensor([1]), values.float()), assert_close)
