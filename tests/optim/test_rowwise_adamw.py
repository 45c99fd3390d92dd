"""RowwiseAdamW against AdamW written out in float64, and against torch's own where gradients are dense."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from million_experts.optim import RowwiseAdamW
from million_experts.optim.row_state import _FIRST_HISTORY

SHAPES = [(1, 2, 5), (7, 2, 16), (6, 3, 21), (9, 33), (5,)]


def sparse(rows, values, shape):
    """A gradient as autograd leaves it after accumulation: not known to be coalesced."""
    rows = torch.as_tensor(rows, dtype=torch.int64).view(1, -1)
    return torch.sparse_coo_tensor(rows, values, shape, check_invariants=True)


class Truth:
    """AdamW in float64 by the definition: a row's missed decay first, step by step, then the step itself."""

    def __init__(self, table, by_row=False):
        self.p, self.by_row = table.detach().double().clone(), by_row and table.dim() > 1
        self.m = torch.zeros_like(self.p)
        self.v = torch.zeros_like(self.p[..., 0] if self.by_row else self.p)
        self.last = [0] * len(table)
        self.options = [None]  # by step

    def catch_up(self, row, step):
        for lr, (beta1, beta2), decay, _ in self.options[self.last[row] + 1 : step + 1]:
            self.p[row] *= 1 - lr * decay
            self.m[row] *= beta1
            self.v[row] *= beta2
        self.last[row] = step

    def step(self, rows, values, lr, betas, decay, eps=1e-8):
        self.options.append((lr, betas, decay, eps))
        t = len(self.options) - 1
        total = torch.zeros_like(self.p).index_add_(0, rows, values.double())
        for row in set(rows.tolist()):
            self.catch_up(row, t - 1)
            g = total[row]
            self.p[row] *= 1 - lr * decay
            self.m[row] = betas[0] * self.m[row] + (1 - betas[0]) * g
            self.v[row] = betas[1] * self.v[row] + (1 - betas[1]) * (
                g.square().mean(-1) if self.by_row else g**2
            )
            root = (self.v[row] / (1 - betas[1] ** t)).sqrt() + eps
            move = self.m[row] / (1 - betas[0] ** t) / (root[..., None] if self.by_row else root)
            self.p[row] -= lr * move
            self.last[row] = t

    def flush(self):
        for row in range(len(self.p)):
            self.catch_up(row, len(self.options) - 1)


def set_options(optimizer, lr, betas, decay):
    optimizer.param_groups[0].update(lr=lr, betas=betas, weight_decay=decay)


@st.composite
def trainings(draw):
    shape = draw(st.sampled_from(SHAPES))
    steps = []
    beta1 = [0.9, 0.5] if draw(st.booleans()) else [0.0]  # a state begins with a first moment or without
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["step"] * 5 + ["flush", "reload", "none"]))
        micro = [
            draw(st.lists(st.integers(0, shape[0] - 1), max_size=6)) for _ in range(draw(st.integers(1, 2)))
        ]
        options = (
            draw(st.sampled_from([1e-2, 3e-3, 0.0])),
            (draw(st.sampled_from(beta1)), draw(st.sampled_from([0.999, 0.9]))),
            draw(st.sampled_from([0.0, 0.1, 2.0])),
        )
        if kind != "none" and beta1 != [0.0]:
            beta1 = [0.9, 0.5, 0.0]
        steps.append((kind, micro, draw(st.booleans()), options))
    return shape, draw(st.sampled_from([torch.float32, torch.float64])), draw(st.booleans()), steps


@given(trainings())
def test_touched_rows_follow_adamw_written_out(assert_close, everywhere, training):
    shape, dtype, by_row, steps = training
    torch.manual_seed(len(steps))
    p = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    second_moment = "row" if by_row else "element"
    optimizer, truth = RowwiseAdamW([p], second_moment=second_moment), Truth(p, by_row)
    for kind, micro, ascending, options in steps:
        if kind == "flush":
            optimizer.flush()
            truth.flush()
        elif kind == "reload":
            fresh = RowwiseAdamW([p])
            fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = fresh
        set_options(optimizer, *options)
        p.grad = None
        if kind == "none":
            optimizer.step()
            continue
        rows = [sorted(set(r)) if ascending else r for r in (micro[:1] if ascending else micro)]
        values = [torch.randn(len(r), *shape[1:], dtype=dtype) for r in rows]
        for r, v in zip(rows, values, strict=True):
            grad = sparse(r, v, shape)
            p.grad = grad if p.grad is None else p.grad + grad
        optimizer.step()
        truth.step(
            torch.tensor([row for part in rows for row in part], dtype=torch.int64),
            torch.cat(values),
            *options,
        )
        assert_close(p, truth.p)
    optimizer.flush()
    truth.flush()
    assert_close(p, truth.p)
    if "last_step" in optimizer.state.get(p, {}):
        state = optimizer.state[p]
        first = next(options for kind, *_, options in steps if kind != "none")
        assert ("exp_avg" in state) == (first[1][0] != 0)
        if "exp_avg" in state:
            assert_close(state["exp_avg"], truth.m)
        assert_close(state["exp_avg_sq"], truth.v)
        assert state["last_step"].tolist() == [len(truth.options) - 1] * shape[0]
        before = copy.deepcopy((p.detach(), state))
        optimizer.flush()
        assert torch.equal(before[0], p)
        assert all(torch.equal(value, state[name]) for name, value in before[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_gradients_get_the_bits_of_torch(dtype):
    torch.manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.randn(5, 3, dtype=dtype)),
        torch.nn.Parameter(torch.randn(4, dtype=dtype)),
    ]
    theirs = copy.deepcopy(ours)
    a = RowwiseAdamW([{"params": ours[:1]}, {"params": ours[1:], "lr": 0.1}], weight_decay=0.1)
    b = torch.optim.AdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.1}], weight_decay=0.1, fused=True
    )
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=6) for o in (a, b)]
    for i in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x) if i != 2 or x is ours[0] else None
            y.grad = x.grad
        for o in (a, b, *schedules):
            o.step()
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y)
            assert a.state[x].keys() == b.state[y].keys()
            assert all(torch.equal(a.state[x][name], b.state[y][name]) for name in b.state[y])
    b.load_state_dict(a.state_dict() | {"param_groups": b.state_dict()["param_groups"]})
    a.load_state_dict(b.state_dict())


def test_the_difference_from_dense_adamw_is_the_missed_momentum():
    # Gradient only at steps 1 ... s. Afterwards dense AdamW moves by lr m_u / (1 - beta1^u) over
    # sqrt(v_u / (1 - beta2^u)) + eps at each u > s, where m_u = beta1^(u-s) m_s and v_u = beta2^(u-s) v_s;
    # ours stays where it is. Weight decay can only shrink what that adds up to.
    torch.manual_seed(0)
    lr, (beta1, beta2), eps, s, end = 1e-2, (0.9, 0.999), 1e-8, 3, 40
    start = torch.randn(4, 2, 8, dtype=torch.float64)
    ours, dense = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a, b = (o([p], lr=lr, weight_decay=0.1) for o, p in ((RowwiseAdamW, ours), (torch.optim.AdamW, dense)))
    for u in range(1, end + 1):
        values = torch.randn_like(start)
        ours.grad = sparse(range(4), values, start.shape) if u <= s else sparse([], values[:0], start.shape)
        dense.grad = values if u <= s else torch.zeros_like(start)
        a.step()
        b.step()
        if u == s:
            m, v = a.state[ours]["exp_avg"].clone(), a.state[ours]["exp_avg_sq"].clone()
            torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    a.flush()
    bound = torch.zeros_like(start)
    for u in range(s + 1, end + 1):
        root = (v * beta2 ** (u - s) / (1 - beta2**u)).sqrt() + eps
        bound += lr * (m * beta1 ** (u - s)).abs() / (1 - beta1**u) / root
    difference = (ours - dense).detach().abs()
    assert (difference <= bound * (1 + 1e-9)).all()
    assert (difference >= 0.9 * bound).all()  # the bound is no more than weight decay away from the truth
    # Moments do not differ at all.
    torch.testing.assert_close(a.state[ours]["exp_avg"], b.state[dense]["exp_avg"], rtol=1e-10, atol=0)
    torch.testing.assert_close(a.state[ours]["exp_avg_sq"], b.state[dense]["exp_avg_sq"], rtol=1e-10, atol=0)
    x = beta1 / math.sqrt(beta2)  # what the docstring says, for large s
    assert x / (1 - x) == pytest.approx(beta1 / (math.sqrt(beta2) - beta1))


KINDS = [
    {},
    {"second_moment": "row"},
    {"momentum_dtype": torch.bfloat16},
    {"second_moment": "row", "momentum_dtype": torch.bfloat16, "stochastic_rounding": False},
    {"momentum_dtype": torch.bfloat16, "second_moment": "row"},
    {"betas": (0.0, 0.99)},
    {"betas": (0.0, 0.99), "second_moment": "row"},
]


def train(shape, dtype, steps=3, share=0.5, flush=True, **options):
    """A few steps with repeated rows; returns the table and its state."""
    generator = torch.Generator().manual_seed(3)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = RowwiseAdamW([p], lr=1e-2, weight_decay=0.5, **options)
    for _ in range(steps):
        rows = torch.randint(shape[0], (max(1, int(share * shape[0])),), generator=generator)
        values = torch.randn(len(rows), *shape[1:], generator=generator).to(dtype)
        p.grad = sparse(rows, values, shape)
        optimizer.step()
    if flush:
        optimizer.flush()
    return {"table": p.detach(), **optimizer.state[p]}


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype, options, everywhere):
    before = torch.get_num_threads()
    expected = train((500, 2, 21), dtype, **options)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for name, value in train((500, 2, 21), dtype, **options).items():
                assert torch.equal(value, expected[name]), (threads, name)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 2, 16), (40, 3, 21), (40, 19), (40,)])
def test_kernels_agree_with_the_plain_version(shape, dtype, options, everywhere, monkeypatch):
    ours = train(shape, dtype, **options)
    monkeypatch.setattr("million_experts.optim.rowwise.resolve_backend", lambda *_: "reference")
    plain = train(shape, dtype, **options)
    assert ours["table"].dtype == plain["table"].dtype == dtype
    for name, value in plain.items():
        assert ours[name].dtype == value.dtype
        # Arithmetic may round the last bit of a float32 otherwise; then a narrow number is, now and then, the
        # next one. Other random bits would change about half of them.
        if value.is_floating_point():
            narrow = value.dtype in (torch.bfloat16, torch.float16)
            step = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(value.dtype, 3e-5)
            torch.testing.assert_close(ours[name], value, rtol=step * 1.01, atol=1e-6)
            if narrow:
                # An error of one table element carries over to at most three later steps.
                assert (ours[name] != value).float().mean() < 0.02, name
        else:
            assert torch.equal(ours[name], value)


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact(everywhere):
    # One step without a gradient's effect but for the decay: each element becomes x * (1 - lr * decay).
    N, D = 512, 130
    for factor in (1 - 2**-10, 1 - 2**-13):
        p = torch.nn.Parameter(torch.full((N, D), 1.5, dtype=torch.bfloat16))
        optimizer = RowwiseAdamW([p], lr=1.0, weight_decay=1 - factor)
        p.grad = sparse(range(N // 2), torch.zeros(N // 2, D, dtype=torch.bfloat16), p.shape)
        optimizer.step()
        optimizer.flush()  # the other half of the rows
        below = 1.5 - 2**-7
        assert set(p.unique().tolist()) == {below, 1.5}
        share = (1.5 - 1.5 * factor) / 2**-7  # of elements that go down
        for half in (p[: N // 2], p[N // 2 :]):
            down = (half == below).double()
            deviation = math.sqrt(share * (1 - share) / half.numel())
            assert abs(down.mean() - share) < 4 * deviation
            for dim in (0, 1):  # nor do rows or columns go together
                spread = down.mean(dim).std() / math.sqrt(share * (1 - share) / half.shape[dim])
                assert 0.8 < spread < 1.2
    exact = torch.nn.Parameter(torch.tensor([[1.0, math.inf, -math.inf, math.nan, 3e-39, -0.0]]).bfloat16())
    before = exact.detach().clone()
    optimizer = RowwiseAdamW([exact], lr=1.0, weight_decay=0.0)
    exact.grad = sparse([0], torch.zeros(1, 6, dtype=torch.bfloat16), exact.shape)
    optimizer.step()
    assert torch.equal(exact.nan_to_num(7.0), before.nan_to_num(7.0))


def test_random_bits_differ_by_seed_step_parameter_and_tensor():
    def masks(seed=0):
        """Which elements of two tables and their momenta were rounded down, in two steps."""
        shape = (64, 64)
        tables = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(2)]
        options = {
            "lr": 1.0,
            "weight_decay": 2**-9,
            "betas": (1 - 2**-9, 0.9),
            "momentum_dtype": torch.bfloat16,
        }
        optimizer = RowwiseAdamW(tables, seed=seed, **options)
        found = []
        for step in range(3):
            for p in tables:
                rows = range(64 if step else 0)  # the first step only makes the states
                p.grad = sparse(rows, torch.zeros(len(rows), 64).bfloat16(), shape)
                if step:
                    p.data.fill_(1.5)
                    optimizer.state[p]["exp_avg"].fill_(1.5)
                    optimizer.state[p]["exp_avg_sq"].fill_(
                        1e30
                    )  # so that the momentum does not move the table
            optimizer.step()
            if step:
                found += [t.detach() != 1.5 for p in tables for t in (p, optimizer.state[p]["exp_avg"])]
        return found

    found = [*masks(), *masks(1)]
    for i, a in enumerate(found):
        assert (
            0.2 < a.float().mean() < 0.8
        )  # in the first of the two steps decay of a missed one comes on top
        for b in found[:i]:
            same = (a == b).float().mean()
            expected = a.float().mean() * b.float().mean() + (1 - a.float().mean()) * (1 - b.float().mean())
            assert abs(same - expected) < 0.04
    assert all(torch.equal(a, b) for a, b in zip(masks(), masks(), strict=True))


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "copy"])
def test_a_state_keeps_its_dtypes_and_goes_on_as_if_nothing_had_happened(way):
    p = torch.nn.Parameter(torch.randn(9, 2, 7).bfloat16())
    optimizer = RowwiseAdamW([p], momentum_dtype=torch.bfloat16, second_moment="row", seed=5)

    def go_on(p, optimizer):
        for i in range(3):
            p.grad = sparse([i, i + 3, i + 5], torch.full((3, 2, 7), i + 1.0).bfloat16(), p.shape)
            optimizer.step()

    go_on(p, optimizer)
    if way in ("state_dict", "file"):
        other = torch.nn.Parameter(p.detach().clone())
        fresh = RowwiseAdamW([other])
        state = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        fresh.load_state_dict(state)
    else:
        fresh = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
        other = fresh.param_groups[0]["params"][0]
    dtypes = {name: value.dtype for name, value in fresh.state[other].items()}
    assert dtypes == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.float32,
        "last_step": torch.int32,
        "history": torch.float64,
    }
    assert fresh.param_groups[0]["seed"] == 5
    for a, b in ((p, optimizer), (other, fresh)):
        go_on(a, b)
        b.flush()
    assert torch.equal(p, other)
    assert all(torch.equal(value, fresh.state[other][name]) for name, value in optimizer.state[p].items())


def test_history_grows_by_doubling_and_long_gaps_are_caught_up(assert_close):
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer, truth = RowwiseAdamW([p], lr=1e-3, weight_decay=0.5), Truth(p)
    for step in range(2 * _FIRST_HISTORY + 10):
        rows = torch.tensor([0, 1] if step % 100 == 0 else [0])
        p.grad = sparse(rows, torch.ones(len(rows), 4), p.shape)
        optimizer.step()
        truth.step(rows, torch.ones(len(rows), 4), 1e-3, (0.9, 0.999), 0.5)
    assert len(optimizer.state[p]["history"]) == 4 * _FIRST_HISTORY
    optimizer.flush()
    truth.flush()
    assert_close(p, truth.p)


def test_an_empty_gradient_counts_as_a_step_and_none_does_not():
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = RowwiseAdamW([p], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert p not in optimizer.state
    p.grad = sparse([], torch.zeros(0, 4), p.shape)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert torch.equal(p, torch.ones(3, 4))
    optimizer.flush()
    assert torch.equal(p, torch.full((3, 4), 0.75))


def test_an_older_graph_notices_the_step(everywhere):
    p = torch.nn.Parameter(torch.ones(3, 4))
    loss = p.square().sum()
    p.grad = sparse([0], torch.ones(1, 4), p.shape)
    RowwiseAdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)])
def test_a_sparse_parameter_may_turn_dense_and_back(betas, everywhere):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 2, 5))
    q = copy.deepcopy(p)
    options = {"lr": 1e-2, "betas": betas, "weight_decay": 0.1}
    ours, torchs = RowwiseAdamW([p], **options), torch.optim.AdamW([q], **options)
    for dense in (False, True, False, True):  # with all rows touched there is no missed momentum
        values = torch.randn(6, 2, 5)
        p.grad = values if dense else sparse(range(6), values, p.shape)
        q.grad = values
        ours.step()
        torchs.step()
        torch.testing.assert_close(p, q)
        assert ("last_step" in ours.state[p]) != dense
        assert ("exp_avg" in ours.state[p]) == (dense or betas[0] != 0)


def test_second_moments_by_row_are_made_of_those_of_dense_steps():
    torch.manual_seed(0)
    first, second = torch.randn(2, 4, 2, 5)
    p = torch.nn.Parameter(torch.zeros(4, 2, 5))
    optimizer = RowwiseAdamW([p], betas=(0.9, 0.5), second_moment="row")
    p.grad = first
    optimizer.step()
    p.grad = sparse([2], second[2:3], p.shape)
    optimizer.step()
    optimizer.flush()
    expected = 0.25 * first.square().mean(-1)
    expected[2] += 0.5 * second[2].square().mean(-1)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], expected)


def test_values_of_a_row_are_summed_in_order_of_appearance(everywhere):
    p = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = RowwiseAdamW([p], betas=(0.5, 0.9))
    # In this order 3 is lost beside 1e8; backwards it is what remains.
    values = torch.tensor([3.0, 7.0, 1e8, -1e8])[:, None].expand(4, 5)
    p.grad = sparse([1, 0, 1, 1], values, p.shape)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"][:, 4].tolist() == [3.5, 0.0, 0.0]


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_without_momentum_a_table_learns_the_same_and_keeps_no_first_moment(second_moment, everywhere):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, 2, 7))
    q = copy.deepcopy(p)
    options = {"lr": 1e-2, "weight_decay": 0.1, "second_moment": second_moment}
    without, kept = (RowwiseAdamW([x], betas=(b, 0.9), **options) for x, b in ((p, 0.0), (q, 0.5)))
    q.grad = sparse([], torch.zeros(0, 2, 7), q.shape)
    kept.step()  # makes a state with a first moment, and is the first of the steps
    kept.param_groups[0]["betas"] = (0.0, 0.9)
    p.grad = q.grad
    without.step()
    for _ in range(4):
        p.grad = q.grad = sparse(torch.randint(5, (3,)), torch.randn(3, 2, 7), p.shape)
        without.step()
        kept.step()
    for optimizer in (without, kept):
        optimizer.flush()
    assert torch.equal(p, q)
    assert "exp_avg" in kept.state[q]
    assert "exp_avg" not in without.state[p]
    assert torch.equal(without.state[p]["exp_avg_sq"], kept.state[q]["exp_avg_sq"])


def test_momentum_cannot_begin_where_none_was_kept(everywhere):
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = RowwiseAdamW([p], betas=(0.0, 0.9))
    p.grad = sparse([1], torch.ones(1, 4), p.shape)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["betas"] = (0.9, 0.9)
    for use in (optimizer.step, lambda: optimizer.begin_step(p)):
        with pytest.raises(ValueError, match=r"first of betas must stay 0 .* got \(0\.9, 0\.9\)"):
            use()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1
    optimizer.flush()  # takes no gradient, so momentum means nothing to it
    p.grad = torch.ones(3, 4)
    optimizer.step()  # a dense gradient begins a first moment
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((3, 4), 1 - 0.9))


def test_turning_dense_flushes_and_is_refused_where_the_state_has_another_form():
    p = torch.nn.Parameter(torch.ones(2, 2, 5))
    optimizer = RowwiseAdamW([p], lr=0.5, weight_decay=0.5)
    p.grad = sparse([0], torch.zeros(1, 2, 5), p.shape)
    optimizer.step()
    p.grad = torch.zeros(2, 2, 5)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2, 5), 0.75**2))
    for dtype, options, named in (
        (torch.float32, {"second_moment": "row"}, "exp_avg_sq"),
        (torch.float32, {"momentum_dtype": torch.bfloat16}, "exp_avg"),
        (torch.bfloat16, {}, "exp_avg"),
    ):
        p = torch.nn.Parameter(torch.ones(2, 2, 5, dtype=dtype))
        optimizer = RowwiseAdamW([p], **options)
        p.grad = sparse([0], torch.ones(1, 2, 5, dtype=dtype), p.shape)
        optimizer.step()
        before = copy.deepcopy((p.detach(), optimizer.state[p]))
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=f"dense gradient.*{named}"):
            optimizer.step()
        assert torch.equal(p, before[0])
        assert all(torch.equal(value, optimizer.state[p][name]) for name, value in before[1].items())


def test_one_cycle_changes_rate_and_betas_of_sparse_steps(assert_close):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, 2, 6))
    optimizer, truth = RowwiseAdamW([p], weight_decay=0.1), Truth(p)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)
    seen = set()
    for _ in range(11):
        rows = torch.randint(5, (2,))
        values = torch.randn(2, 2, 6)
        group = optimizer.param_groups[0]
        seen.add(group["betas"])
        truth.step(rows, values, group["lr"], group["betas"], 0.1)
        p.grad = sparse(rows, values, p.shape)
        optimizer.step()
        schedule.step()
    assert len(seen) > 5
    assert_close(p, truth.p)


def test_an_embedding_trains_with_a_closure():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 8, sparse=True)
    optimizer = RowwiseAdamW(embedding.parameters(), lr=0.05, weight_decay=0.0)
    words = torch.tensor([3, 7, 3, 9])
    untouched = embedding.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (embedding(words) - 1).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert losses[-1] < 0.01 * losses[0]
    rest = [i for i in range(50) if i not in (3, 7, 9)]
    assert torch.equal(embedding.weight[rest], untouched[rest])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be .* got -1"),
        ({"eps": -1e-8}, "eps must be .* got -1e-08"),
        ({"weight_decay": math.inf}, "weight_decay must be .* got inf"),
        ({"betas": (0.9, 1.0)}, r"betas must be .* got \(0.9, 1.0\)"),
        ({"second_moment": "column"}, "second_moment must be one of 'element', 'row', got 'column'"),
        (
            {"momentum_dtype": torch.float16},
            "momentum_dtype must be None or torch.bfloat16, got torch.float16",
        ),
        ({"seed": 0.5}, "seed must be an int, got 0.5"),
    ],
)
def test_bad_options(options, message):
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=message):
        RowwiseAdamW([p], **options)
    with pytest.raises(ValueError, match=message):
        RowwiseAdamW([{"params": [p], **options}])


def test_bad_gradients_change_nothing():
    def refused(message, grad=None, dtype=torch.float32, **options):
        first = torch.nn.Parameter(torch.ones(3, 4))
        p = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype))
        first.grad = torch.ones(3, 4)
        p.grad = sparse([0], torch.ones(1, 4, dtype=dtype), p.shape) if grad is None else grad
        optimizer = RowwiseAdamW([first, p], **options)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert torch.equal(first, torch.ones(3, 4))
        assert not optimizer.state

    refused("1 sparse dimension, got 2", torch.ones(3, 4).to_sparse())
    refused("lr \\* weight_decay must be below 1, got 2.0 \\* 0.5", lr=2.0, weight_decay=0.5)
    refused("momentum_dtype must be None for a float64", dtype=torch.float64, momentum_dtype=torch.bfloat16)
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[0, 3]]), torch.ones(2, 4), (3, 4), check_invariants=False)
    with pytest.raises(ValueError, match=r"rows of a sparse gradient must be in 0 \.\.\. 2, got \[0, 3\]"):
        RowwiseAdamW([p]).step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p, state: setattr(p, "data", p.data.double()),
            "exp_avg must be float64 for a table in .*float64",
        ),
        (
            lambda p, state: state.update(exp_avg=state["exp_avg"].half()),
            "exp_avg must be float32 or bfloat16",
        ),
        (
            lambda p, state: state.update(exp_avg_sq=state["exp_avg_sq"].double()),
            "exp_avg_sq must be float32",
        ),
        (lambda p, state: state.update(exp_avg=state["exp_avg"][:2]), r"exp_avg must have shape \[3, 4\]"),
        (lambda p, state: state.update(last_step=state["last_step"][:2]), r"last_step must have shape \[3\]"),
        (lambda p, state: state.update(last_step=state["last_step"].long()), "last_step must be int32"),
    ],
)
def test_a_state_of_another_table_is_refused_before_it_is_written_to(change, message):
    """Kernels write by address: what is smaller than they take it for would be memory of others."""
    pytest.importorskip("million_experts.ops.cpu")
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = RowwiseAdamW([p])
    p.grad = sparse([0], torch.ones(1, 4), p.shape)
    optimizer.step()
    change(p, optimizer.state[p])
    before = p.detach().clone()
    p.grad = sparse([2], torch.ones(1, 4, dtype=p.dtype), p.shape)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    with pytest.raises(ValueError, match=message):
        optimizer.begin_step(p)
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1


def test_untouched_rows_take_no_memory(measure_peaks):
    peaks = measure_peaks(
        """
        from million_experts.optim import RowwiseAdamW
        torch.set_num_threads(1)
        N, D = 2**16, 256
        p = torch.nn.Parameter(torch.ones(N, 2, D))
        optimizer = RowwiseAdamW([p], weight_decay=0.1)
        def step():
            p.grad = torch.sparse_coo_tensor(torch.arange(100)[None], torch.ones(100, 2, D), p.shape)
            optimizer.step()
        def run():
            step()
            optimizer.flush()
            step()
            optimizer.flush()
        peaks = {"steps": peak(run), "table": p.nbytes}
        """
    )
    assert peaks["steps"] < 0.2 * peaks["table"]
