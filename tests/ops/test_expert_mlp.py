"""expert_mlp against the same sum with every expert gathered."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from million_experts.ops import ACTIVATIONS, expert_mlp, reference
from million_experts.ops.backends import implementation

FORWARD = torch.ops.million_experts.expert_mlp.default
BACKWARD = torch.ops.million_experts.expert_mlp_backward.default
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FUNCTIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def naive(x: Tensor, indices: Tensor, gates: Tensor, experts: Tensor, activation: str) -> Tensor:
    """The definition, in float64, with a tensor [T, K, R, D] of all chosen rows."""
    chosen = experts.double()[indices]
    hidden = FUNCTIONS[activation](torch.einsum("td,tkd->tk", x.double(), chosen[:, :, 0]))
    if chosen.shape[2] == 3:
        hidden = hidden * torch.einsum("td,tkd->tk", x.double(), chosen[:, :, 2])
    return torch.einsum("tk,tkd->td", gates.double() * hidden, chosen[:, :, 1])


def make_inputs(
    seed: int = 0,
    T: int = 5,
    K: int = 6,
    N: int = 7,
    D: int = 9,
    glu: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float64,) * 3,
) -> Inputs:
    """x, indices, gates, experts; `dtypes` are those of x, gates and experts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, D), (T, K), (N, 3 if glu else 2, D))
    x, gates, experts = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(d)
        for s, d in zip(shapes, dtypes, strict=True)
    )
    return x, torch.randint(0, N, (T, K), generator=generator), gates, experts


def run_with_gradients(inputs: Inputs, activation: str, grad_y: Tensor, **options) -> list[Tensor]:
    x, indices, gates, experts = inputs
    x, gates, experts = (t.detach().clone().requires_grad_() for t in (x, gates, experts))
    y = expert_mlp(x, indices, gates, experts, activation, **options)
    y.backward(grad_y)
    return [y.detach(), x.grad, gates.grad, experts.grad]


def naive_with_gradients(inputs: Inputs, activation: str, grad_y: Tensor) -> list[Tensor]:
    x, indices, gates, experts = inputs
    x, gates, experts = (t.detach().double().requires_grad_() for t in (x, gates, experts))
    y = naive(x, indices, gates, experts, activation)
    y.backward(grad_y.double())
    return [y.detach(), x.grad, gates.grad, experts.grad]


@st.composite
def cases(draw: st.DrawFn) -> Inputs:
    x, indices, gates, experts = make_inputs(
        draw(st.integers(0, 2**30)),
        T=draw(st.integers(0, 4)),
        K=draw(st.integers(0, 5)),
        N=draw(st.integers(1, 6)),
        D=draw(st.sampled_from([1, 2, 3, 5, 8, 17])),
        glu=draw(st.booleans()),
    )
    if draw(st.booleans()):
        indices = torch.full_like(indices, draw(st.integers(0, len(experts) - 1)))
    return x, indices, gates, experts


@given(inputs=cases(), activation=st.sampled_from(ACTIVATIONS), gaps=st.booleans())
def test_equals_the_definition_with_its_gradients(
    inputs, activation, gaps, assert_close, spread_out, backend
):
    grad_y = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = naive_with_gradients(inputs, activation, grad_y)
    x, indices, gates, experts = (spread_out(t) if gaps else t for t in inputs)
    for t in (x, gates, experts):
        t.requires_grad_()
    y = expert_mlp(x, indices, gates, experts, activation, backend=backend)
    assert y.dtype == torch.float64
    y.backward(spread_out(grad_y) if gaps else grad_y)
    for actual, right in zip((y, x.grad, gates.grad, experts.grad), expected, strict=True):
        assert_close(actual, right)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
def test_one_expert_chosen_by_every_token(activation, glu, assert_close, backend):
    x, indices, gates, experts = make_inputs(T=40, K=8, N=50, glu=glu)
    inputs = (x, torch.full_like(indices, 49), gates, experts)
    results = run_with_gradients(inputs, activation, x, backend=backend)
    for actual, right in zip(results, naive_with_gradients(inputs, activation, x), strict=True):
        assert_close(actual, right)
    assert not results[3][:49].any()


@pytest.mark.parametrize(("T", "K"), [(0, 0), (0, 3), (3, 0), (1, 1)])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do_gives_zeros(T, K, glu, dtype, assert_close, backend):
    inputs = make_inputs(T=T, K=K, glu=glu, dtypes=(torch.float32, dtype, dtype))
    y, grad_x, grad_gates, grad_experts = run_with_gradients(
        inputs, "silu", torch.ones_like(inputs[0]), backend=backend
    )
    assert y.shape == grad_x.shape == (T, 9)
    assert grad_gates.shape == (T, K)
    assert grad_experts.shape == inputs[3].shape
    if T * K == 0:
        assert not y.any()
        assert not grad_x.any()
        assert not grad_experts.any()
    else:
        assert_close(y, naive(*inputs, "silu"))


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)))
@pytest.mark.parametrize("glu", [False, True])
def test_dtypes_may_differ(dtypes, glu, assert_close, backend):
    # With x in float32 and a bfloat16 table, an x rounded to bfloat16 would be off by 100 tolerances.
    inputs = make_inputs(1, T=6, D=17, glu=glu, dtypes=dtypes)
    grad_y = torch.randn(6, 17).to(dtypes[0])
    results = run_with_gradients(inputs, "gelu", grad_y, backend=backend)
    expected = naive_with_gradients(inputs, "gelu", grad_y)
    for actual, right, dtype in zip(results, expected, (dtypes[0], *dtypes), strict=True):
        assert actual.dtype == dtype
        # float64 beside anything widens all sums, float32 alone gives float32's precision
        assert_close(actual, right)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 3, (torch.float32, torch.bfloat16, torch.float64)])
def test_only_the_gradients_that_are_wanted(wanted, masked, dtypes, backend):
    inputs = make_inputs(2, dtypes=dtypes)
    mask = torch.tensor([True, False, True, True, False]) if masked else None
    grad_y = torch.randn(5, 9).to(dtypes[0])
    expected = run_with_gradients(inputs, "gelu", grad_y, mask=mask, backend=backend)
    x, indices, gates, experts = inputs
    tensors = [t.clone().requires_grad_(w) for t, w in zip((x, gates, experts), wanted, strict=True)]
    expert_mlp(tensors[0], indices, *tensors[1:], mask=mask, backend=backend).backward(grad_y)
    for t, right, wants in zip(tensors, expected[1:], wanted, strict=True):
        assert torch.equal(t.grad, right) if wants else t.grad is None


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("glu", "masked"), [(False, False), (True, False), (True, True)])
def test_gradcheck(activation, glu, masked, backend):
    x, indices, gates, experts = make_inputs(3, T=3, K=3, N=3, D=2, glu=glu)
    mask = torch.tensor([True, False, True]) if masked else None
    tensors = [t.requires_grad_() for t in (x, gates, experts)]
    assert torch.autograd.gradcheck(
        lambda x, gates, experts: expert_mlp(
            x, indices, gates, experts, activation, mask=mask, backend=backend
        ),
        tensors,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("mask", [None, [True, False, True]])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,) * 3,
        (torch.bfloat16, torch.float64, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
    ],
)
def test_registration_is_sound(glu, mask, dtypes, backend):
    x, indices, gates, experts = make_inputs(4, T=3, K=2, N=4, D=5, glu=glu, dtypes=dtypes)
    mask = None if mask is None else torch.tensor(mask)
    x = x.t().contiguous().t()
    inputs = (x, indices, gates, experts)
    y, pre = FORWARD(*inputs, mask, "silu", backend)
    for needs in ([True] * 3, [True, False, False], [False, True, False], [False, False, True]):
        opcheck(BACKWARD, (y, *inputs, pre, mask, "silu", needs, backend))
    for t in (x, gates, experts):
        t.requires_grad_()
    opcheck(FORWARD, (*inputs, mask, "silu", backend))


def test_double_backward_is_refused(backend):
    x, indices, gates, experts = make_inputs(5)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(
        expert_mlp(x, indices, gates, experts, backend=backend).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"expert_mlp has no second derivative.*double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 3, (torch.float32, torch.bfloat16, torch.bfloat16)])
def test_masked_tokens_count_for_nothing_whatever_they_hold(activation, glu, dtypes, backend):
    x, indices, gates, experts = make_inputs(6, T=6, N=20, glu=glu, dtypes=dtypes)
    mask = torch.tensor([True, False, True, True, False, False])
    grad_y = torch.randn(6, 9).to(dtypes[0])
    indices = torch.where(mask[:, None], indices % 10, indices % 10 + 10)  # masked tokens have their own
    expected = run_with_gradients(
        (x[mask], indices[mask], gates[mask], experts), activation, grad_y[mask], backend=backend
    )

    x[1], x[4, 2], x[5] = float("nan"), float("inf"), float("-inf")
    gates[1, 0], gates[4] = float("nan"), float("inf")
    grad_y[4], grad_y[5, 0] = float("nan"), float("inf")
    experts = experts.clone()
    experts[15] = float("nan")
    y, grad_x, grad_gates, grad_experts = run_with_gradients(
        (x, indices, gates, experts), activation, grad_y, mask=mask, backend=backend
    )
    for actual, right in zip((y, grad_x, grad_gates), expected, strict=False):
        assert torch.equal(actual[mask], right)
        assert torch.equal(actual[~mask], torch.zeros_like(actual[~mask]))
    assert torch.equal(grad_experts, expected[3])
    assert not grad_experts[10:].any()
    assert grad_experts[:10].any()


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 3, (torch.float32, torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("glu", [False, True])
def test_nothing_but_masked_tokens_gives_zeros(dtypes, glu, backend):
    inputs = make_inputs(7, glu=glu, dtypes=dtypes)
    inputs[0].fill_(float("nan"))
    for result in run_with_gradients(
        inputs, "gelu", torch.ones_like(inputs[0]), mask=torch.zeros(5, dtype=torch.bool), backend=backend
    ):
        assert torch.equal(result, torch.zeros_like(result))


def test_mask_of_real_tokens_changes_nothing(backend):
    inputs = make_inputs(7)
    grad_y = torch.randn(5, 9, dtype=torch.float64)
    without = run_with_gradients(inputs, "relu", grad_y, backend=backend)
    for a, b in zip(
        run_with_gradients(inputs, "relu", grad_y, mask=torch.ones(5, dtype=torch.bool), backend=backend),
        without,
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_harms_no_other(value, dtype, backend):
    x, indices, gates, experts = make_inputs(8, dtypes=(torch.float32, torch.float32, dtype))
    y = expert_mlp(x, indices, gates, experts, backend=backend)
    x[2, 3] = value
    broken = expert_mlp(x, indices, gates, experts, backend=backend)
    assert not torch.isfinite(broken[2]).any()
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(broken[others], y[others])


@pytest.mark.parametrize("of_table", [torch.float32, torch.bfloat16])
def test_autocast_casts_tokens_and_gates_but_neither_table_nor_sums(of_table, backend):
    x, indices, gates, experts = make_inputs(9, K=40, D=33, dtypes=(torch.float32, torch.float32, of_table))
    low = (x.bfloat16(), indices, gates.bfloat16(), experts)
    grad_y = torch.randn(5, 33).bfloat16()
    expected = run_with_gradients(low, "gelu", grad_y, backend=backend)
    if of_table == torch.float32:
        assert not torch.equal(expected[0], expert_mlp(*low[:3], experts.bfloat16(), backend=backend))
    for t in (x, gates, experts):
        t.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_mlp(x, indices, gates, experts, backend=backend)
        y.backward(grad_y)  # backward is meant to run outside, but must not go wrong inside
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected[0])
    assert x.grad.dtype == gates.grad.dtype == torch.float32
    assert experts.grad.dtype == of_table
    assert torch.equal(x.grad, expected[1].float())
    assert torch.equal(gates.grad, expected[2].float())
    assert torch.equal(experts.grad, expected[3])


def test_autocast_leaves_float64_alone(assert_close, backend):
    inputs = make_inputs(9)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_mlp(*inputs, backend=backend)
    assert y.dtype == torch.float64
    assert_close(y, naive(*inputs, "gelu"))


def test_the_same_bits_on_every_run_and_any_number_of_threads(backend):
    inputs = make_inputs(10, T=300, K=16, N=40, D=33, glu=True, dtypes=(torch.float32,) * 3)
    first = run_with_gradients(inputs, "gelu", inputs[0], backend=backend)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for a, b in zip(
                run_with_gradients(inputs, "gelu", inputs[0], backend=backend), first, strict=True
            ):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paths_without_a_gathered_copy_agree_with_those_that_gather(
    dtype, assert_close, spread_out, monkeypatch
):
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 4000)
    generator = torch.Generator().manual_seed(11)
    # Values that bfloat16 holds exactly: a table of that dtype has to be gathered and widened.
    low = torch.randn(30, 13, generator=generator).bfloat16()
    table = low.to(dtype)
    x, weights = (torch.randn(20, n, generator=generator, dtype=dtype) for n in (13, 6))
    rows = torch.randint(0, 30, (20, 6), generator=generator)
    dots = torch.einsum("td,tkd->tk", x.double(), table.double()[rows])
    mixed = torch.einsum("tk,tkd->td", weights.double(), table.double()[rows])
    for same in (table, spread_out(table), low):
        assert_close(reference.dots(x, same, rows), dots, dtype)
        assert_close(reference.mix(weights, same, rows), mixed, dtype)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.bfloat16)])
def test_chunks_change_nothing(dtypes, assert_close, monkeypatch):
    inputs = make_inputs(12, T=23, N=29, glu=True, dtypes=dtypes)
    inputs = tuple(t.mul(2).round().div(2) if t.is_floating_point() else t for t in inputs)
    grad_y = torch.randn(23, 9).to(dtypes[0]).round()
    # Halves, whose products ReLU leaves exact: another order of summation cannot change a bit.
    whole = run_with_gradients(inputs, "relu", grad_y, backend="reference")
    for size in (1, 1000):
        monkeypatch.setattr(reference, "SCRATCH_BYTES", size)
        for a, b in zip(run_with_gradients(inputs, "relu", grad_y, backend="reference"), whole, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_scratch_memory_is_bounded(measure_peaks, backend):
    assert reference.SCRATCH_BYTES == 64 * 2**20  # the promise; measured with 2 MiB, which is quicker
    # [T, K, D] has 32 MiB in float32, the table 1 MiB.
    script = """
        from million_experts.ops import expert_mlp, reference
        reference.SCRATCH_BYTES = 2 * 2**20
        T, K, N, D = 256, 32, 128, 1024
        indices = torch.randint(0, N, (T, K))
        peaks = {}
        for dtype, mask in (
            (torch.float32, None), (torch.bfloat16, torch.rand(T) > 0.1), (torch.float64, None)
        ):
            x = torch.randn(T, D, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
            gates = torch.randn(T, K).requires_grad_()
            experts = torch.randn(N, 2, D).to(dtype).requires_grad_()
            run = lambda: expert_mlp(x, indices, gates, experts, mask=mask, backend=BACKEND).sum()
            run().backward()  # whatever is set up once
            x.grad = gates.grad = experts.grad = None
            peaks[f"{dtype} forward"] = peak(run)
            peaks[f"{dtype} forward and backward"] = peak(lambda: run().backward())
            x.grad = gates.grad = experts.grad = None
    """
    peaks = measure_peaks(script.replace("BACKEND", repr(backend)))
    # 2 MiB, a few times the inputs and outputs (2 MiB each in float64), and the allocator's own.
    for name, peak in peaks.items():
        assert peak < 16 * 2**20, f"{name}: {peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("bad", [-1, 7, 2**32, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("masked", [False, True])
def test_experts_outside_the_pool_are_refused_before_anything_is_computed(bad, masked, monkeypatch, backend):
    x, indices, gates, experts = make_inputs(13)
    indices[4, 5] = bad

    def computed(*_):
        raise AssertionError("computed something")

    monkeypatch.setattr(implementation(backend), "expert_mlp", computed)
    low, high = min(bad, int(indices.min())), max(bad, int(indices.max()))
    with pytest.raises(IndexError, match=rf"indices must lie in \[0, 7\).*from {low} to {high}"):
        expert_mlp(
            x,
            indices,
            gates,
            experts,
            mask=torch.ones(5, dtype=torch.bool) if masked else None,
            backend=backend,
        )


def test_experts_of_masked_tokens_may_be_anything(backend):
    x, indices, gates, experts = make_inputs(14)
    mask = torch.tensor([True, False, True, True, False])
    expected = expert_mlp(x, indices, gates, experts, mask=mask, backend=backend)
    indices[~mask] = 10**9
    x, gates, experts = (t.requires_grad_() for t in (x, gates, experts))
    y = expert_mlp(x, indices, gates, experts, mask=mask, backend=backend)
    y.sum().backward()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, r"activation must be one of 'gelu', 'relu', 'silu', got 'tanh'"),
        ({"backend": "cuda"}, r"backend must be one of 'auto', .*, got 'cuda'"),
        ({"x": torch.zeros(5, 1, 9)}, r"x must have shape \[T, D\], got \[5, 1, 9\]"),
        (
            {"x": torch.zeros(5, 9, dtype=torch.int64)},
            r"x must have a floating-point dtype, got torch\.int64",
        ),
        ({"experts": torch.zeros(7, 9)}, r"experts must have shape \[N, 2 or 3, 9\] to fit x, got \[7, 9\]"),
        ({"experts": torch.zeros(7, 4, 9)}, r"experts must have shape .*, got \[7, 4, 9\]"),
        ({"experts": torch.zeros(7, 2, 8)}, r"experts must have shape .*, got \[7, 2, 8\]"),
        ({"experts": torch.zeros(7, 2, 9, dtype=torch.int8)}, r"experts must have a floating.*torch\.int8"),
        ({"indices": torch.zeros(30, dtype=torch.int64)}, r"indices must have shape \[5, K\].*, got \[30\]"),
        ({"indices": torch.zeros(4, 6, dtype=torch.int64)}, r"indices must have shape .*, got \[4, 6\]"),
        ({"indices": torch.zeros(5, 6, dtype=torch.int32)}, r"indices must be int64, got torch\.int32"),
        ({"experts": torch.zeros(7, 2, 9, dtype=torch.float8_e5m2)}, r"experts must have a .*float8_e5m2"),
        ({"gates": torch.zeros(5, 5)}, r"gates must have the shape of indices, \[5, 6\], got \[5, 5\]"),
        ({"gates": torch.zeros(5, 6, dtype=torch.bool)}, r"gates must have a floating.*torch\.bool"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask must be bool of shape \[5\].*torch\.bool \[4\]"),
        ({"mask": torch.ones(5)}, r"mask must be bool of shape \[5\].*torch\.float32 \[5\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message, backend):
    x, indices, gates, experts = make_inputs(14)
    arguments = {"x": x, "indices": indices, "gates": gates, "experts": experts} | change
    with pytest.raises(ValueError, match=message):
        expert_mlp(**arguments)
    if "backend" not in change:  # the operation itself takes a backend that runs
        registered = {"mask": None, "activation": "gelu", "backend": backend} | arguments
        with pytest.raises(ValueError, match=message):
            torch.ops.million_experts.expert_mlp(**registered)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_y": torch.zeros(5, 8)}, r"grad_y must have shape \[5, 9\], got \[5, 8\]"),
        ({"pre": torch.zeros(1, 5, 5)}, r"pre must have shape \[1, 5, 6\], got \[1, 5, 5\]"),
        ({"indices": torch.zeros(5, 6, dtype=torch.int32)}, r"indices must be int64, got torch\.int32"),
    ],
)
def test_arguments_of_backward_that_do_not_fit_are_named(change, message, backend):
    x, indices, gates, experts = make_inputs(14)
    good = {
        "grad_y": x, "x": x, "indices": indices, "gates": gates, "experts": experts,
        "pre": gates.new_zeros(1, *gates.shape), "mask": None, "activation": "gelu", "needs": [True] * 3,
        "backend": backend,
    }  # fmt: skip
    torch.ops.million_experts.expert_mlp_backward(**good)
    with pytest.raises(ValueError, match=message):
        torch.ops.million_experts.expert_mlp_backward(**(good | change))
