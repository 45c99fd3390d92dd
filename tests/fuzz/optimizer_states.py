"""States of RowwiseAdamW as files of strangers have them: they are taken and train, or nothing changes."""

from __future__ import annotations

import contextlib
import copy
import math
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fuzz.tensors import filled, spoil, wrongs
from million_experts.optim import RowwiseAdamW

REFUSALS = (ValueError,)
SHAPES = ((7, 2, 3), (300, 4))
TENSORS = ("step", "exp_avg", "exp_avg_sq", "last_step", "history")
OPTIONS: dict[str, dict[str, Any]] = {
    "element": {},
    "row": {"second_moment": "row"},
    "bfloat16": {"momentum_dtype": torch.bfloat16},
    "no momentum": {"betas": (0.0, 0.99)},
}
numbers = st.sampled_from(
    [-(2**40), -1, 0, 0.5, 1, 3, 4, 255, 256, 10**4, 2**24, 2**31, 2**63, 1e300, math.inf, math.nan]
)
anything = st.one_of(numbers, st.sampled_from([None, "3", b"", [1.0], (0.5, 0.5), {}, True, 1j]))

OPTION_NAMES = [
    "lr", "betas", "eps", "weight_decay", "second_moment", "momentum_dtype", "stochastic_rounding", "seed",
    "params", "amsgrad", "maximize", "more",
]  # fmt: skip


def change(what: str, **values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"what": st.just(what), **values})


one, names = st.integers(0, 2), st.sampled_from(TENSORS)
other_names = st.sampled_from([*TENSORS, "more", "max_exp_avg_sq"])
tops = st.sampled_from(["state", "param_groups", "more"])
changes = st.one_of(
    change("spoiled", of=one, name=names, wrong=wrongs),
    change("number", of=one, name=names, place=st.integers(0, 999), number=numbers),
    change("other", of=one, name=other_names, value=anything),
    change("missing", of=one, name=names),
    change("state", of=st.integers(-1, 4), value=anything),
    change("swapped", **{"of": one, "with": one}),
    change("option", name=st.sampled_from(OPTION_NAMES), value=anything),
    change("group", value=anything),
    change("top", name=tops, value=anything),
)

cases = st.fixed_dictionaries(
    {
        "stored": st.sampled_from(sorted(OPTIONS)),
        "options": st.sampled_from(sorted(OPTIONS)),
        "table": st.sampled_from(["float32", "bfloat16", "float64"]),
        "changes": st.lists(changes, max_size=2),
        "rows": st.lists(st.integers(0, 6), max_size=4),
    }
)


def started(table: str, options: str, steps: int) -> tuple[list[nn.Parameter], RowwiseAdamW]:
    """Two tables and a vector after some steps."""
    parameters = [nn.Parameter(filled(shape, table)) for shape in SHAPES] + [
        nn.Parameter(filled((5,), table))
    ]
    given = OPTIONS["element" if table == "float64" and options == "bfloat16" else options]
    optimizer = RowwiseAdamW(parameters, **given)
    for step in range(steps):
        set_gradients(parameters, [step, 6])
        optimizer.step()
    return parameters, optimizer


def set_gradients(parameters: list[nn.Parameter], rows: list[int]) -> None:
    for p in parameters[:-1]:
        values = torch.ones(len(rows), *p.shape[1:], dtype=p.dtype)
        indices = torch.tensor([rows], dtype=torch.int64)
        p.grad = torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=False)
    parameters[-1].grad = torch.ones_like(parameters[-1])


@cache
def stored(table: str, options: str) -> dict[str, Any]:
    return started(table, options, 3)[1].state_dict()


def make(change: dict[str, Any], state: dict[str, Any]) -> None:
    what, states = change["what"], state["state"]
    if what == "top":
        state[change["name"]] = change["value"]
        return
    if what == "group":
        state["param_groups"][0] = change["value"]
        return
    if what == "option":
        state["param_groups"][0][change["name"]] = change["value"]
        return
    if what == "state":
        states[change["of"]] = change["value"]
        return
    if what == "swapped":
        states[change["of"]], states[change["with"]] = states[change["with"]], states[change["of"]]
        return
    of, name = states[change["of"]], change["name"]
    if what == "other":
        of[name] = change["value"]
    elif what == "missing":
        of.pop(name, None)
    elif isinstance(given := of.get(name), Tensor):
        if (
            what == "spoiled"
            and change["wrong"]["what"] == "wrapper"
            and change["of"] == 2
            and name != "step"
        ):
            return  # moments of dense gradients may be of any class, sharded ones; this one can do nothing
        if what == "spoiled":
            of[name] = spoil(given, change["wrong"])
        elif given.is_floating_point():
            given.view(-1)[change["place"] % given.numel()] = torch.tensor(float(change["number"])).to(
                given.dtype
            )
        elif math.isfinite(change["number"]):
            info = torch.iinfo(given.dtype)
            given.view(-1)[change["place"] % given.numel()] = max(
                info.min, min(info.max, int(change["number"]))
            )


def snapshot(parameters: list[nn.Parameter], optimizer: RowwiseAdamW) -> list[Any]:
    states = [dict(optimizer.state.get(p, {})) for p in parameters]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    copies = [{k: copied(v) for k, v in state.items()} for state in states]
    return [[p.detach().clone() for p in parameters], copies, copy.deepcopy(options), len(optimizer.state)]


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        if not a.is_floating_point():
            return torch.equal(a, b)
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    return bool(a == b) or (a != a and b != b)


def unchanged_or_done(action: Any, parameters: list[nn.Parameter], optimizer: RowwiseAdamW) -> None:
    before = snapshot(parameters, optimizer)
    try:
        action()
    except Exception:
        assert same(before, snapshot(parameters, optimizer)), "it was refused, and something has changed"
        raise


def attempt(case: dict[str, Any]) -> None:
    state = copy.deepcopy(stored(case["table"], case["stored"]))
    for change in case["changes"]:
        with contextlib.suppress(TypeError, LookupError, AttributeError):  # an earlier one took its place
            make(change, state)
    parameters, optimizer = started(case["table"], case["options"], 2)
    unchanged_or_done(lambda: optimizer.load_state_dict(state), parameters, optimizer)
    set_gradients(parameters, case["rows"])
    unchanged_or_done(optimizer.step, parameters, optimizer)
    optimizer.flush()
    optimizer.load_state_dict(optimizer.state_dict())
