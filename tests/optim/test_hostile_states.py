"""States of RowwiseAdamW that do not fit are refused, on loading and at a step, and nothing changes.

Kernels, torch's own among them, write by address: what does not fit would be memory of others.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from million_experts.optim import RowwiseAdamW
from million_experts.optim.stored_state import refuse_misfits

N, D = 6, 4


def rows_gradient(p: torch.Tensor, rows: tuple[int, ...] = (1, 4)) -> torch.Tensor:
    values = torch.ones(len(rows), *p.shape[1:], dtype=p.dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, p.shape, check_invariants=False)


def trained(kind: str, **options) -> tuple[nn.Parameter, RowwiseAdamW]:
    """A parameter after three steps with "rows" or "dense" gradients."""
    p = nn.Parameter(torch.ones(N, D))
    optimizer = RowwiseAdamW([p], **options)
    for _ in range(3):
        p.grad = rows_gradient(p) if kind == "rows" else torch.ones(N, D)
        optimizer.step()
    return p, optimizer


def snapshot(p: torch.Tensor, optimizer: RowwiseAdamW) -> dict:
    return copy.deepcopy({"p": p.detach(), **optimizer.state_dict()})


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def put(**values):
    return lambda state: state.update(values)


def row_of(name, row, value):
    return lambda state: state[name].__setitem__(row, value)


def made(name, change):
    return lambda state: state.update({name: change(state[name])})


def emptied(name):
    def change(state):
        state[name] = state[name].clone()
        state[name].untyped_storage().resize_(0)

    return change


# What stands in a stored state, and what the error says.
ROWS = [
    (row_of("last_step", 4, 10**9), r"last_step must lie in 0 \.\.\. 3, got values from 0 to 1000000000"),
    (row_of("last_step", 4, 4), r"last_step must lie in 0 \.\.\. 3, got values from 0 to 4"),
    (row_of("last_step", 0, -1), r"last_step must lie in 0 \.\.\. 3, got values from -1 to 3"),
    (made("last_step", lambda t: t.long()), "last_step must be int32"),
    (made("last_step", lambda t: t[:-1]), r"last_step must have shape \[6\], got \[5\]"),
    (made("last_step", lambda t: t.tolist()), "last_step must be a dense tensor, got list"),
    (made("last_step", lambda t: t.to("meta")), "last_step must hold numbers, got a tensor on the meta"),
    (emptied("last_step"), "last_step must lie in memory whole: it needs 24 bytes, its storage has 0"),
    (made("history", lambda t: t[:3]), r"history must have shape \[> 3, 3\], got \[3, 3\]"),
    (made("history", lambda t: t[:, :2].contiguous()), r"history must have shape \[> 3, 3\], got"),
    (made("history", lambda t: t.float()), "history must be float64"),
    (made("history", lambda t: t[:1, :1].expand(10**13, 3)), "history must have memory for each of its"),
    (row_of("history", 2, math.nan), "history must be finite numbers that never rise"),
    (row_of("history", 3, -math.inf), "history must be finite numbers that never rise"),
    (row_of("history", 3, 0.0), "history must be finite numbers that never rise"),
    (row_of("history", 0, 1.0), "history must be finite numbers that never rise"),
    (emptied("history"), "history must lie in memory whole: it needs 6144 bytes, its storage has 0"),
    (put(step=torch.tensor(-1.0)), "step must be a whole number from 0 to 16777216, got -1.0"),
    (put(step=torch.tensor(math.nan)), "step must be a whole number .* got nan"),
    (put(step=torch.tensor(math.inf)), "step must be a whole number .* got inf"),
    (put(step=torch.tensor(2.5)), "step must be a whole number .* got 2.5"),
    (put(step=2**31), "step must be a whole number .* got 2147483648"),
    (put(step=torch.tensor(2.0**24)), r"history must have shape \[> 16777216, 3\]"),
    (put(step=torch.zeros(2)), "step must be a whole number"),
    (put(step=None), "step must be a whole number .* got None"),
    (put(step=torch.tensor(2.0)), r"last_step must lie in 0 \.\.\. 2, got values from 0 to 3"),
    (made("exp_avg", lambda t: t.half()), "exp_avg must be float32 or bfloat16"),
    (made("exp_avg", lambda t: t.t().contiguous()), r"exp_avg must have shape \[6, 4\], got \[4, 6\]"),
    (made("exp_avg", lambda t: t.to_sparse()), "exp_avg must be a dense tensor, got torch.sparse_coo"),
    (emptied("exp_avg"), "exp_avg must lie in memory whole: it needs 96 bytes, its storage has 0"),
    (made("exp_avg_sq", lambda t: t.bfloat16()), "exp_avg_sq must be float32"),
    (
        made("exp_avg_sq", lambda t: t[:, :3].contiguous()),
        r"exp_avg_sq must have shape \[6, 4\], got \[6, 3\]",
    ),
    (made("exp_avg_sq", lambda t: t[0, 0]), r"exp_avg_sq must have shape \[6\], got \[\]"),
    (emptied("exp_avg_sq"), "exp_avg_sq must lie in memory whole: it needs 96 bytes, its storage has 0"),
    *[
        (lambda state, name=name: state.pop(name), f"must have .*, got no {name}")
        for name in ("step", "exp_avg_sq", "last_step", "history")
    ],
    (lambda state: state.pop("exp_avg"), "the first of betas must stay 0 .* no first moment was kept"),
]
DENSE = [
    (made("exp_avg", lambda t: t[:1]), r"exp_avg must have shape \[6, 4\], got \[1, 4\]"),
    (made("exp_avg_sq", lambda t: t.mean(-1)), r"exp_avg_sq must have shape \[6, 4\], got \[6\]"),
    (made("exp_avg", lambda t: t.long()), "exp_avg must be floating-point .* got torch.int64"),
    (made("exp_avg_sq", lambda t: t.to(torch.complex64)), "exp_avg_sq must be floating-point"),
    (emptied("exp_avg"), "exp_avg must lie in memory whole: it needs 96 bytes, its storage has 0"),
    (made("exp_avg", lambda t: t.to("meta")), "exp_avg must hold numbers, got a tensor on the meta"),
    (put(step=-3), "step must be a .* got -3"),
    (put(step=torch.tensor(math.nan)), "step must be a whole number .* got nan"),
    *[
        (lambda state, name=name: state.pop(name), f"must have step, exp_avg, exp_avg_sq, got no {name}")
        for name in ("step", "exp_avg", "exp_avg_sq")
    ],
]
CASES = [("rows", *case) for case in ROWS] + [("dense", *case) for case in DENSE]


@pytest.mark.parametrize(("kind", "change", "message"), CASES)
def test_refused_on_loading(kind, change, message):
    stored = copy.deepcopy(trained(kind)[1].state_dict())
    change(stored["state"][0])
    p, optimizer = trained(kind)
    before = snapshot(p, optimizer)
    with pytest.raises(
        ValueError, match=rf"state of parameter 0, of shape \[6, 4\], does not fit: .*{message}"
    ):
        optimizer.load_state_dict(stored)
    assert same(before, snapshot(p, optimizer))


@pytest.mark.parametrize("gradient", ["rows", "dense"])
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    # A step looks at no number of the history, and at the last steps of the rows that it touches.
    [
        case
        for case in CASES
        if not any(word in case[2] for word in ("never rise", "memory for each", "meta"))
    ],
)
def test_a_state_that_was_altered_by_hand_is_refused_at_a_step(kind, change, message, gradient):
    p, optimizer = trained(kind)
    change(optimizer.state[p])
    if gradient == "dense" and "first moment" in message:
        return  # it begins one
    if kind == "dense" and gradient == "dense" and message.startswith("step"):
        return  # torch's own count, which addresses nothing
    p.grad = rows_gradient(p, tuple(range(N))) if gradient == "rows" else torch.ones(N, D)
    held = p.detach().clone()
    with pytest.raises((ValueError, BufferError), match=message):
        optimizer.step()
    if kind == "rows" and "first moment" not in message:
        with pytest.raises((ValueError, BufferError), match=message):
            optimizer.flush()
    if gradient == "rows":
        with pytest.raises((ValueError, BufferError), match=message):
            optimizer.begin_step(p)
    assert torch.equal(p, held)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "last_step"])
def test_what_is_laid_out_otherwise_is_refused_at_a_step_and_put_in_order_on_loading(name):
    def strided(state):
        wide = torch.stack([state[name], state[name]], -1)
        state[name] = wide[..., 0]

    p, optimizer = trained("rows")
    expected, _ = trained("rows")
    stored = copy.deepcopy(optimizer.state_dict())
    strided(optimizer.state[p])
    p.grad = rows_gradient(p)
    with pytest.raises(ValueError, match=f"{name} must be contiguous, got strides"):
        optimizer.step()
    strided(stored["state"][0])
    optimizer.load_state_dict(stored)
    optimizer.step()
    assert optimizer.state[p][name].is_contiguous()
    other, fresh = trained("rows")
    other.grad = rows_gradient(other)
    fresh.step()
    assert torch.equal(p, other)
    assert not torch.equal(p, expected)


def test_states_of_parameters_in_another_order_are_refused():
    """torch's fused AdamW takes the moments' sizes for the parameter's, and writes beyond them."""

    def make(*sizes):
        parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
        for p in parameters:
            p.grad = torch.ones_like(p)
        return parameters, RowwiseAdamW(parameters)

    _, stored = make(10, 2_000_000)
    stored.step()
    parameters, optimizer = make(2_000_000, 10)
    with pytest.raises(
        ValueError, match=r"state of parameter 0, of shape \[2000000\], does not fit: exp_avg"
    ):
        optimizer.load_state_dict(stored.state_dict())
    assert not optimizer.state
    for p, other in zip(parameters, reversed(stored.param_groups[0]["params"]), strict=True):
        optimizer.state[p] = stored.state[other]  # now each fits
    optimizer.step()


@pytest.mark.parametrize(("kind", "change", "message"), [case for case in CASES if case[0] == "dense"])
def test_torchs_fused_adamw_refuses_the_same_where_we_train_with_it(kind, change, message):
    stored = copy.deepcopy(trained(kind)[1].state_dict())
    p = nn.Parameter(torch.ones(N, D))
    optimizer = torch.optim.AdamW([p], fused=True)
    optimizer.register_load_state_dict_pre_hook(refuse_misfits)
    with pytest.raises(ValueError, match="is of rows"):
        optimizer.load_state_dict(copy.deepcopy(trained("rows")[1].state_dict()))
    optimizer.load_state_dict(copy.deepcopy(stored))
    before = copy.deepcopy(optimizer.state_dict())
    change(stored["state"][0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(stored)
    assert same(before, optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"betas": (0.9, 1.5)}, "betas must be two numbers"),
        ({"params": None}, "param_groups must be a dict with params"),
        ({"second_moment": "column"}, "second_moment must be one of"),
        ({"momentum_dtype": torch.int8}, "momentum_dtype must be"),
        ({"seed": "1"}, "seed must be an int"),
        ({"maximize": True}, "maximize must be False"),
        ({"amsgrad": True}, "amsgrad must be False"),
        ({"lr": None}, "lr must be a finite number of at least 0, got None"),
        ({"lr": "3"}, "lr must be a finite number of at least 0, got '3'"),
        ({"lr": torch.ones(2)}, "lr must be a finite number"),
        ({"eps": [1.0]}, "eps must be a finite number"),
        ({"eps": 10**400}, "eps must be a finite number"),
        ({"weight_decay": 1j}, "weight_decay must be a finite number"),
        ({"betas": 3}, "betas must be two numbers of at least 0 and below 1, got 3"),
        ({"betas": None}, "betas must be two numbers"),
        ({"betas": ("0", "0")}, "betas must be two numbers"),
        ({"params": None}, "must be a dict with params, a list"),
        ({"params": [[0]]}, "params must name parameters by numbers or texts"),
    ],
)
def test_options_that_no_optimiser_has_are_refused_on_loading(options, message):
    p, optimizer = trained("rows")
    stored = copy.deepcopy(optimizer.state_dict())
    stored["param_groups"][0].update(options)
    before = snapshot(p, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(stored)
    assert same(before, snapshot(p, optimizer))


@pytest.mark.parametrize(
    "stored", [{}, {"state": {}}, {"param_groups": []}, {"state": [], "param_groups": []}]
)
def test_what_is_no_state_of_an_optimiser_is_refused(stored):
    _, optimizer = trained("rows")
    with pytest.raises(ValueError, match="a state of an optimiser must have"):
        optimizer.load_state_dict(stored)


class Unreadable(torch.Tensor):
    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, ())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {func}")


@pytest.mark.parametrize("kind", ["rows", "dense"])
def test_a_step_that_cannot_be_read_is_refused(kind):
    p, optimizer = trained(kind)
    stored, before = copy.deepcopy(optimizer.state_dict()), snapshot(p, optimizer)
    stored["state"][0]["step"] = Unreadable()
    with pytest.raises(ValueError, match="step must be a whole number"):
        optimizer.load_state_dict(stored)
    emptied = torch.tensor(3.0)
    emptied.untyped_storage().resize_(0)
    stored["state"][0]["step"] = emptied
    with pytest.raises(ValueError, match=r"does not fit: step .* memory"):
        optimizer.load_state_dict(stored)
    assert same(before, snapshot(p, optimizer))


@pytest.mark.parametrize("kind", ["rows", "dense"])
@pytest.mark.parametrize("count", [3, torch.tensor(3), torch.tensor(3.0).half(), torch.tensor(3.0)])
def test_a_count_of_steps_of_another_kind_goes_on(kind, count):
    found, optimizer = trained(kind)
    stored = copy.deepcopy(optimizer.state_dict())
    stored["state"][0]["step"] = copy.deepcopy(count)
    optimizer.load_state_dict(stored)
    expected, other = trained(kind)
    for p, one in ((found, optimizer), (expected, other)):
        p.grad = rows_gradient(p) if kind == "rows" else torch.ones(N, D)
        one.step()
    assert torch.equal(found, expected)
    assert optimizer.state[found]["step"].dtype == torch.float32


@pytest.mark.parametrize("nothing", [None, 0, {}, ""])
def test_a_state_that_is_nothing_begins_anew(nothing):
    p, optimizer = trained("rows")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: nothing}})
    assert not optimizer.state
    p.grad = rows_gradient(p)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("group", [None, 3, {}, []])
def test_groups_that_are_none_are_refused(group):
    p, optimizer = trained("rows")
    before = snapshot(p, optimizer)
    with pytest.raises(ValueError, match="each of param_groups must be a dict with params"):
        optimizer.load_state_dict(optimizer.state_dict() | {"param_groups": [group]})
    assert same(before, snapshot(p, optimizer))


def test_options_that_are_tensors_of_one_number_count_as_numbers():
    options = {"eps": 1e-3, "weight_decay": 0.1, "betas": (0.5, 0.9)}
    p, _ = trained("rows", **options)
    tensors = {"eps": torch.tensor(1e-3), "weight_decay": torch.tensor(0.1)}
    q, _ = trained("rows", **options | tensors)
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_torchs_adamw_go_to_ours_and_back(dtype):
    def step(p, optimizer):
        p.grad = torch.linspace(-1, 1, N * D).view(N, D).to(dtype)
        optimizer.step()

    p = nn.Parameter(torch.ones(N, D, dtype=dtype))
    optimizer = torch.optim.AdamW([p], fused=True)
    expected = copy.deepcopy(optimizer), None
    one = nn.Parameter(p.detach().clone())
    expected = torch.optim.AdamW([one], fused=True)
    for _ in range(3):
        step(one, expected)
    step(p, optimizer)
    ours = RowwiseAdamW([p])
    ours.load_state_dict(optimizer.state_dict())
    step(p, ours)
    back = torch.optim.AdamW([p], fused=True)
    back.load_state_dict(ours.state_dict())
    step(p, back)
    assert torch.equal(p, one)


def test_float32_moments_serve_a_parameter_that_became_bfloat16():
    """As with torch's AdamW, which casts them on loading; a table may still want them as they were."""
    p, stored = trained("dense")
    narrow = nn.Parameter(p.detach().bfloat16())
    optimizer = RowwiseAdamW([narrow])
    optimizer.load_state_dict(copy.deepcopy(stored.state_dict()))
    assert optimizer.state[narrow]["exp_avg"].dtype == torch.float32
    theirs = nn.Parameter(narrow.detach().clone())
    reference = torch.optim.AdamW([theirs], fused=True)
    reference.load_state_dict(copy.deepcopy(stored.state_dict()))
    for q, opt in ((narrow, optimizer), (theirs, reference)):
        q.grad = torch.full((N, D), 0.5, dtype=torch.bfloat16)
        opt.step()
    assert torch.equal(narrow, theirs)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.flip(0).flip(0),
    ],
)
@pytest.mark.parametrize("of", ["gradient", "parameter", "exp_avg"])
def test_dense_steps_do_not_depend_on_the_layout_of_tensors(layout, of):
    """torch's fused AdamW reads all in the order of memory: it took a transposed gradient for another one."""
    weights, gradient = torch.randn(N, D), torch.randn(N, D)
    found = []
    for change in (lambda t: t, layout):
        p = nn.Parameter(change(weights.clone()) if of == "parameter" else weights.clone())
        optimizer = RowwiseAdamW([p])
        for _ in range(2):
            p.grad = change(gradient.clone()) if of == "gradient" else gradient.clone()
            optimizer.step()
            if of == "exp_avg":
                optimizer.state[p]["exp_avg"] = change(optimizer.state[p]["exp_avg"])
        found.append(p.detach().clone())
    torch.testing.assert_close(*found)


def test_a_gradient_that_repeats_one_number_is_read_within_its_memory():
    p, optimizer = nn.Parameter(torch.ones(3_000_000)), None
    optimizer = RowwiseAdamW([p], weight_decay=0.0)
    p.grad = torch.ones(1).expand_as(p)
    optimizer.step()
    assert torch.equal(p, p[:1].expand_as(p))


def test_a_bad_row_in_a_gradient_changes_no_other_parameter():
    first, p = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(N, D))
    optimizer = RowwiseAdamW([first, p])
    first.grad, p.grad = torch.ones(3), rows_gradient(p, (0, N))
    with pytest.raises(ValueError, match="rows of a sparse gradient must be in"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3))
    assert not optimizer.state
