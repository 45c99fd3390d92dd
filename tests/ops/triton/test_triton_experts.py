"""The experts by the Triton kernels, in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from unittest.mock import patch

import expert_steps
import pytest
import torch
from expert_steps import Inputs, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from million_experts import PEER
from million_experts.ops import ACTIVATIONS, expert_mlp, reference

pytest.importorskip("triton", reason="Triton is not installed")
import triton_interpreter

from million_experts.ops import triton_expert_rows, triton_expert_tiles
from million_experts.ops import triton_experts as kernels
from million_experts.ops.triton_expert_rows import ByToken, RowSums
from million_experts.ops.triton_expert_tiles import ByTiles

triton_interpreter.repair()

# NumPy, in which the interpreter computes, warns of overflow and NaN, which are meant here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NARROW = (torch.float32, torch.bfloat16, torch.float16)
WALKS = (ByToken, ByTiles)
step = functools.partial(expert_steps.step, backend="triton")


@pytest.fixture(params=WALKS, ids=lambda walk: walk.__name__)
def walk(request: pytest.FixtureRequest) -> Iterator[type]:
    """Makes the backend go token by token, or by tiles, whatever the shapes."""
    with patch.object(kernels, "schedule", lambda *_: request.param):
        yield request.param


def check(
    inputs: Inputs, grad_y: Tensor, assert_close, activation: str = "gelu", spread=lambda t: t, **options
):
    x, indices, gates, experts = inputs
    wide = (x.double(), indices, gates.double(), experts.double())
    expected = step(wide, grad_y.double(), activation, backend="reference", **options)
    actual = step(tuple(map(spread, inputs)), spread(grad_y), activation, **options)
    dtypes = {"y": x.dtype, "x": x.dtype, "gates": gates.dtype, "experts": experts.dtype}
    for name, right in expected.items():
        assert actual[name].dtype == dtypes[name]
        assert_close(actual[name].to_dense(), right.to_dense())
    return actual


@st.composite
def cases(draw: st.DrawFn) -> dict:
    N, T = draw(st.integers(1, 8)), draw(st.integers(0, 4))
    inputs, grad_y = make_inputs(
        draw(st.integers(0, 2**30)),
        T,
        K=draw(st.integers(0, 4)),
        N=N,
        D=draw(st.sampled_from([1, 2, 7, 16, 33, 130])),
        glu=draw(st.booleans()),
        dtypes=draw(st.tuples(*[st.sampled_from(NARROW)] * 3)),
    )
    if draw(st.booleans()):  # few of the experts, often repeated
        inputs[1].remainder_(draw(st.integers(1, N)))
    return {
        "inputs": inputs,
        "grad_y": grad_y,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "mask": torch.rand(T) > 0.3 if draw(st.booleans()) else None,
        "sparse_grad": draw(st.booleans()),
    }


@given(case=cases(), gaps=st.booleans(), chosen=st.sampled_from(WALKS))
@settings(max_examples=40)
def test_agrees_with_the_reference(case, gaps, chosen, assert_close, spread_out):
    with patch.object(kernels, "schedule", lambda *_: chosen):
        check(**case, assert_close=assert_close, **({"spread": spread_out} if gaps else {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
def test_every_activation(activation, glu, walk, assert_close):
    check(*make_inputs(1, glu=glu), assert_close, activation)


@pytest.mark.parametrize("dtypes", list(itertools.product(NARROW, repeat=3)))
def test_dtypes_may_differ(dtypes, walk, assert_close):
    # With x in float32 and a bfloat16 table, an x rounded to bfloat16 would be off by 100 tolerances.
    check(*make_inputs(2, T=2, K=2, N=3, D=17, glu=True, dtypes=dtypes), assert_close, "silu")


@pytest.mark.parametrize("D", [31, 64, 127, 129, 256, 257, 600])  # pieces have 32, 64, 128 and 256 columns
def test_widths(D, walk, assert_close):
    check(*make_inputs(D, T=2, K=2, N=3, D=D, glu=D % 2 == 1), assert_close)


@pytest.mark.parametrize("D", [8191, 8192])
def test_the_widest(D, walk, assert_close):
    check(*make_inputs(D, T=2, K=1, N=1, D=D, glu=True), assert_close)


@pytest.mark.parametrize("K", [1, 4, 7, 8, 9, 33])  # 4 or 8 rows at a time, 32 picks of a token
@pytest.mark.parametrize("glu", [False, True])
def test_numbers_of_picks(K, glu, walk, assert_close):
    check(*make_inputs(K, T=2, K=K, N=5, D=5, glu=glu), assert_close)


@pytest.mark.parametrize(("T", "N"), [(1, 1), (63, 2), (65, 1), (2, 64), (2, 65), (2, 130)])
def test_tiles_of_tokens_and_blocks_of_experts(T, N, assert_close):
    with patch.object(kernels, "schedule", lambda *_: ByTiles):
        check(*make_inputs(T + N, T=T, K=2, N=N, D=5, glu=True), assert_close, "relu")


@pytest.mark.parametrize("glu", [False, True])
def test_tiles_take_as_many_tokens_at_a_time_as_fit(glu, assert_close, monkeypatch):
    monkeypatch.setattr(triton_expert_tiles, "SCRATCH_BYTES", 4 * 64 * 3)
    monkeypatch.setattr(triton_expert_tiles, "ENOUGH_PROGRAMS", 2)  # two parts of the sums over tokens
    monkeypatch.setattr(kernels, "schedule", lambda *_: ByTiles)
    check(*make_inputs(3, T=130, K=2, N=3, D=5, glu=glu), assert_close)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_hot_expert_is_summed_in_parts(glu, sparse_grad, assert_close, monkeypatch):
    monkeypatch.setattr(triton_expert_rows, "PART", 8)
    monkeypatch.setattr(kernels, "schedule", lambda *_: ByToken)
    inputs, grad_y = make_inputs(4, T=12, K=4, N=9, D=5, glu=glu)
    for picks in (
        torch.full((12, 4), 8),
        torch.arange(48).view(12, 4) // 9,
        torch.arange(48).view(12, 4) // 16,
    ):
        inputs[1].copy_(picks)  # all of one expert; experts of 9 pairs; of 16, in two whole parts
        with patch.object(
            triton_expert_rows, "table_parts_kernel", Counted(triton_expert_rows.table_parts_kernel)
        ) as counted:
            check(inputs, grad_y, assert_close, sparse_grad=sparse_grad)
        assert counted.launches == 1


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def test_parts_of_all_experts_fit_in_the_scratch_memory():
    for pairs, R, D in ((100, 2, 8), (2**18, 2, 256), (2**21, 3, 4096), (2**30, 3, 8192)):
        length = triton_expert_rows.part_length(pairs, R, D)
        assert length >= triton_expert_rows.PART
        assert 2 * pairs // length * R * D * 4 <= triton_expert_rows.SCRATCH_BYTES


@pytest.mark.parametrize(("T", "K"), [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_nothing_to_do_gives_zeros(T, K, glu, dtype):
    inputs, grad_y = make_inputs(T=T, K=K, glu=glu, dtypes=(dtype, torch.float32, dtype))
    for sparse_grad in (False, True):
        results = step(inputs, grad_y, sparse_grad=sparse_grad)
        for name, tensor in (
            ("y", inputs[0]),
            ("x", inputs[0]),
            ("gates", inputs[2]),
            ("experts", inputs[3]),
        ):
            assert torch.equal(results[name].to_dense(), torch.zeros_like(tensor))


def test_nothing_but_masked_tokens_gives_zeros():
    inputs, grad_y = make_inputs()
    inputs[0].fill_(float("nan"))
    for result in step(inputs, grad_y, mask=torch.zeros(3, dtype=torch.bool)).values():
        assert torch.equal(result, torch.zeros_like(result))


def test_an_index_outside_the_pool_is_refused():
    inputs, grad_y = make_inputs()
    for wrong in (-1, 5):
        inputs[1][1, 1] = wrong
        with pytest.raises(IndexError, match=r"indices must lie in \[0, 5\)"):
            step(inputs, grad_y)
        step(inputs, grad_y, mask=torch.tensor([True, False, True]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("glu", [False, True])
def test_a_table_beyond_32_bits(dtype, glu, walk, assert_close):
    """Three experts that lie 2**30 numbers apart, and more: 4 GiB of addresses, a page of memory each."""
    (x, indices, gates, small), grad_y = make_inputs(5, T=4, K=3, N=3, D=20, glu=glu, dtypes=(dtype,) * 3)
    R = small.shape[1]
    apart = 2**30 + 16
    experts = triton_interpreter.addressed((2 * apart + R * 24,), dtype).as_strided(
        (3, R, 20), (apart, 24, 1)
    )
    experts.copy_(small)
    y, pre = kernels.expert_mlp(x, indices, gates, experts, "gelu")
    right, right_pre = reference.expert_mlp(x.double(), indices, gates.double(), small.double(), "gelu")
    assert_close(y, right)
    assert_close(pre, right_pre)
    options = "gelu", True, True, True
    for actual, expected in zip(
        kernels.expert_mlp_backward(grad_y, x, indices, gates, experts, pre, *options),
        reference.expert_mlp_backward(
            grad_y.double(), x.double(), indices, gates.double(), small.double(), right_pre, *options
        ),
        strict=True,
    ):
        assert_close(actual, expected)


def test_a_dense_gradient_beyond_32_bits(assert_close):
    """Of the programs of 2**20 experts only those of the last run, whose rows lie beyond 2**31 numbers."""
    N, R, D, K = 2**20 + 1, 2, 1024, 3
    generator = torch.Generator().manual_seed(0)
    x, grad_y = torch.randn(2, 4, D, generator=generator)
    weights = torch.randn(R, 4, K, generator=generator)
    starts = triton_interpreter.addressed((N + 1,), torch.int64)
    starts[N] = 4 * K  # every pick is the last expert's
    sums = RowSums(x, grad_y, weights, torch.arange(4 * K), starts)
    values = triton_interpreter.addressed((N, R, D), torch.bfloat16)
    kernel = triton_expert_rows.table_rows_kernel
    chunks = D // kernel.configs[0].kwargs["BLOCK_D"]
    with triton_interpreter.programs_from((N - 1) * chunks):
        kernel[(chunks,)](
            x, grad_y, weights, sums.order, starts, sums.part_starts, sums.parts, values, 4 * K, K, D,
            PARTED=sums.parted, R=R,
        )  # fmt: skip
    per_token = weights.sum(2)
    assert_close(values[-1, 0], per_token[0] @ x)
    assert_close(values[-1, 1], per_token[1] @ grad_y)
    assert not values[0].any()


@pytest.mark.parametrize("glu", [False, True])
def test_the_same_bits_twice_and_for_the_touched_rows(glu, walk):
    inputs, grad_y = make_inputs(6, T=6, K=4, N=7, D=33, glu=glu)
    first, again = step(inputs, grad_y), step(inputs, grad_y)
    sparse = step(inputs, grad_y, sparse_grad=True)
    assert sparse["experts"].is_sparse
    assert torch.equal(sparse["experts"]._indices()[0], inputs[1].unique())
    for name, bits in first.items():
        assert torch.equal(again[name], bits)
        assert torch.equal(sparse[name].to_dense(), bits)


@pytest.mark.parametrize("glu", [False, True])
def test_configurations_move_no_sum(glu, walk, monkeypatch):
    """Whatever autotuning takes on a GPU, the bits are those of the first configuration."""
    monkeypatch.setattr(triton_expert_rows, "PART", 4)
    inputs, grad_y = make_inputs(7, T=5, K=9, N=4, D=300, glu=glu)
    expected = step(inputs, grad_y)
    tuned = {
        "dots_kernel": triton_expert_rows.DOTS_CONFIGS,
        "mix_kernel": triton_expert_rows.MIX_CONFIGS,
        "table_rows_kernel": triton_expert_rows.TABLE_CONFIGS,
        "table_parts_kernel": triton_expert_rows.TABLE_CONFIGS,
    }
    if walk is ByTiles:  # these differ in warps and stages alone
        assert all(not config.kwargs for config in triton_expert_tiles.TILE_CONFIGS)
        return
    for number in range(1, 4):
        for name, configs in tuned.items():
            kernel = getattr(triton_expert_rows, name)
            monkeypatch.setattr(kernel, "configs", [configs[min(number, len(configs) - 1)]])
        for name, bits in step(inputs, grad_y).items():
            assert torch.equal(bits, expected[name])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_each_gradient_alone_has_the_same_bits(wanted, walk):
    (x, indices, gates, experts), grad_y = make_inputs(8, glu=True)
    expected = step((x, indices, gates, experts), grad_y)
    tensors = [t.clone().requires_grad_(w) for t, w in zip((x, gates, experts), wanted, strict=True)]
    expert_mlp(tensors[0], indices, *tensors[1:], backend="triton").backward(grad_y)
    for tensor, name, wants in zip(tensors, ("x", "gates", "experts"), wanted, strict=True):
        assert torch.equal(tensor.grad, expected[name]) if wants else tensor.grad is None


def test_touched_rows_are_handed_over_in_order(walk, monkeypatch):
    monkeypatch.setattr(kernels, "VISIT_BYTES", 2 * 2 * 10 * 4)
    (x, indices, gates, experts), grad_y = make_inputs(9, T=4, N=40)
    pre = torch.randn(1, 4, 3)
    arguments = (grad_y, x, indices, gates, experts, pre, "gelu", True, True)
    visited: list[tuple[Tensor, Tensor]] = []
    *expected, rows, values = kernels.expert_mlp_backward_touched(*arguments)
    *grads, none, nothing = kernels.expert_mlp_backward_touched(
        *arguments, lambda r, v: visited.append((r, v))
    )
    assert len(visited) == (len(rows) + 1) // 2 if walk is ByToken else 1
    assert none.numel() == 0
    assert nothing.shape == (0, 2, 10)
    for actual, right in zip(
        (*grads, *map(torch.cat, zip(*visited, strict=True))), (*expected, rows, values), strict=True
    ):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("glu", [False, True])
def test_no_tensor_of_tokens_times_picks_times_width(glu, walk):
    """Nor anything near it: the largest tensors are the inputs and what comes out."""
    inputs, grad_y = make_inputs(10, T=8, K=16, N=9, D=64, glu=glu)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                t.untyped_storage().nbytes()
                for t in torch.utils._pytree.tree_leaves(result)
                if isinstance(t, Tensor)
            )
            return result

    with Watch():
        step(inputs, grad_y)
    assert max(sizes) <= max(4 * 8 * 16 * 64 // 8, inputs[3].nbytes)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_with_its_tokens_and_experts(glu, value, walk):
    inputs, grad_y = make_inputs(11, T=6, K=3, N=12, D=5, glu=glu)
    x, indices, gates, experts = inputs
    indices.remainder_(7)
    indices[3, 1] = indices[5, 0] = 7
    clean = step(inputs, grad_y, "silu")
    for poisoned, tokens in (("x", [2]), ("gates", [4]), ("experts", [3, 5]), ("grad_y", [1])):
        x, indices, gates, experts = (t.clone() for t in inputs)
        of_y = grad_y.clone()
        if poisoned == "x":
            x[2, 4] = value
        elif poisoned == "gates":
            gates[4, 2] = value
        elif poisoned == "experts":
            experts[7] = value
        else:
            of_y[1, 3] = value
        broken = step((x, indices, gates, experts), of_y, "silu")
        others = torch.ones(6, dtype=torch.bool)
        others[tokens] = False
        if poisoned == "grad_y":
            assert not torch.isfinite(broken["x"][tokens]).any()
        else:
            assert not torch.isfinite(broken["y"][tokens]).all(-1).any()
        for name in ("y", "x", "gates"):
            assert torch.equal(broken[name][others], clean[name][others]), (poisoned, name)
        spared = torch.ones(12, dtype=torch.bool)
        spared[indices[tokens].flatten()] = False
        assert torch.equal(broken["experts"][spared], clean["experts"][spared])


@pytest.mark.parametrize("glu", [False, True])
def test_picks_of_weight_zero_see_what_is_not_finite(glu, walk):
    """Zero times NaN is NaN, what was not picked stays out of it: as in the reference, number by number."""
    inputs, grad_y = make_inputs(12, T=6, K=3, N=9, D=5, glu=glu)
    inputs[2][1] = 0.0
    inputs[2][2, 0] = -0.0
    rows = [(3, expert, row) for expert in inputs[1][1:3].flatten().tolist() for row in range(2 + glu)]
    for place, *at in [*rows, (0, 1), (0, 2)]:
        broken = [t.clone() for t in inputs]
        broken[place][*at] = float("nan")
        actual, expected = (step(broken, grad_y, "silu", backend=b) for b in ("triton", "reference"))
        for name, value in expected.items():
            assert torch.equal(actual[name].isfinite(), value.isfinite()), (name, place, at)


def test_gradients_of_a_narrow_table_are_rounded_once(walk):
    # 300 tokens of one expert: a sum kept in bfloat16 would stop at 256.
    x, indices, gates = torch.ones(300, 16), torch.zeros(300, 1, dtype=torch.int64), torch.ones(300, 1)
    experts = torch.ones(1, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    expert_mlp(x, indices, gates, experts, "relu", backend="triton").sum().backward()
    assert torch.equal(experts.grad, torch.full((1, 2, 16), 16 * 300.0).bfloat16())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_pre_activations(activation, walk):
    """y is the activation at z, and the gradient of x its slope."""
    z = torch.tensor([0.0, 1e-40, 1e-3, 0.7, 5.5, 13.2, 50, 88, 1e4, 1e15, 3e38])
    z = torch.cat([z, -z])
    x = z[:, None].clone().requires_grad_()
    first, gates, ones = torch.zeros(len(z), 1, dtype=torch.int64), torch.ones(len(z), 1), torch.ones(1, 2, 1)
    y = expert_mlp(x, first, gates, ones, activation, backend="triton")[:, 0]
    y.sum().backward()
    wide = z.double().requires_grad_()
    expected = reference.activate(activation, wide)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    for actual, right in ((y.detach(), expected), (x.grad[:, 0], slope)):
        allowed = 1e-6 * right.abs() + 1e-6 * wide.abs().clamp(max=6) + 1e-38
        assert ((actual.double() - right).abs() <= allowed).all()


def test_the_schedule_follows_the_reuse():
    # 1,296 experts of which each of 2048 tokens takes 240; 16,384 and a million with 128; one token; few
    # tokens.
    assert kernels.schedule(2048, 240, 36**2) is ByTiles
    assert kernels.schedule(2048, 128, 128**2) is ByToken
    assert kernels.schedule(2048, 128, 1024**2) is ByToken
    assert kernels.schedule(1, 128, 128**2) is ByToken
    assert kernels.schedule(10**6, 128, 128**2) is ByToken  # a tile has no more tokens for that
    assert kernels.schedule(0, 8, 5) is ByToken
    assert kernels.schedule(9, 0, 0) is ByToken


def test_more_pairs_than_31_bits_count_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "MOST_PAIRS", 9)
    with pytest.raises(ValueError, match=r"indices must hold fewer than 2\*\*31 picks, got \[3, 3\]"):
        step(*make_inputs())


def test_float64_goes_to_the_reference():
    inputs, grad_y = make_inputs(12, dtypes=(torch.float32, torch.float32, torch.float64))
    for name, bits in step(inputs, grad_y, backend="reference").items():
        assert torch.equal(step(inputs, grad_y)[name], bits)


def test_registration_is_sound(walk):
    (x, indices, gates, experts), _ = make_inputs(
        13, D=5, glu=True, dtypes=(torch.float32, torch.bfloat16, torch.float16)
    )
    mask = torch.tensor([True, False, True])
    for t in (x, gates, experts):
        t.requires_grad_()
    opcheck(
        torch.ops.million_experts.expert_mlp.default,
        (x, indices, gates, experts, mask, "silu", "triton"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_meta_tensors_give_shapes():
    (x, indices, gates, experts), _ = make_inputs(glu=True, dtypes=(torch.bfloat16,) * 3)
    x, indices, gates, experts = (t.to("meta") for t in (x, indices, gates, experts))
    experts.requires_grad_()
    y = expert_mlp(x, indices, gates, experts, backend="triton")
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
    y.sum().backward()
    assert experts.grad.shape == experts.shape


def test_a_layer_trains_and_compiles(assert_close):
    torch.manual_seed(0)
    with patch("million_experts.layers.peer.INIT_PAIRS", 2**10):
        layer = PEER(8, (6, 5), num_heads=2, experts_per_head=3, key_dim=4, glu=True)
    x = torch.randn(2, 3, 8)
    results = []
    for backend in ("reference", "triton"):
        layer.backend = backend
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in layer.parameters())])
    for actual, right in zip(*reversed(results), strict=True):
        assert_close(actual, right)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x).detach(), results[0][0])
