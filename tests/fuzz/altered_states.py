"""States of RowwiseAdamW, stored ones and ones that a user altered: a step takes them or refuses them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fuzz.tensors import spoil, wrongs
from million_experts.optim import RowwiseAdamW

NAMES = ("step", "exp_avg", "exp_avg_sq", "last_step", "history")
NUMBERS = (-1.0, 0.5, 2.0, 3.0, 4.0, 2.0**24, 2.0**31, float("nan"), float("inf"))

cases = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([[6, 2, 5], [6, 5], [6], [1, 1], [40, 3], [0, 3]]),
        "table": st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
        "momentum": st.booleans(),
        "second_moment": st.sampled_from(["element", "row"]),
        "trained": st.sampled_from(["rows", "dense"]),
        "then": st.sampled_from(["rows", "dense", "flush", "begin_step"]),
        "by_hand": st.booleans(),
        "wrong": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(NAMES), "how": wrongs}), min_size=1, max_size=2
        ),
        "numbers": st.dictionaries(
            st.sampled_from(["step", "last_step", "history"]), st.sampled_from(NUMBERS), max_size=1
        ),
    }
)


def gradient(p: Tensor, kind: str) -> Tensor:
    if kind == "dense":
        return torch.ones_like(p)
    rows = torch.arange(0, len(p), 2)
    values = torch.ones(len(rows), *p.shape[1:], dtype=p.dtype)
    return torch.sparse_coo_tensor(rows[None], values, p.shape, check_invariants=False)


def trained(case: dict[str, Any]) -> tuple[nn.Parameter, RowwiseAdamW]:
    p = nn.Parameter(torch.ones(case["shape"], dtype=getattr(torch, case["table"])))
    betas = (0.9 if case["momentum"] else 0.0, 0.99)
    optimizer = RowwiseAdamW([p], betas=betas, second_moment=case["second_moment"])
    for _ in range(3):
        p.grad = gradient(p, case["trained"])
        optimizer.step()
    return p, optimizer


def spoiled(state: dict[str, Any], case: dict[str, Any]) -> None:
    for name, number in case["numbers"].items():
        if name in state and state[name].numel() and not (name == "last_step" and number != number):
            state[name].view(-1)[-1] = (
                max(-(2.0**30), min(2.0**30, number)) if name == "last_step" else number
            )
    for wrong in case["wrong"]:
        value = state.get(wrong["name"])
        if not isinstance(value, Tensor) or type(value) is not Tensor or value.layout != torch.strided:
            continue
        if value.is_meta or value.untyped_storage().nbytes() < value.nbytes:
            continue
        changed = spoil(value, wrong["how"])
        if changed is None:
            del state[wrong["name"]]
        else:
            state[wrong["name"]] = changed


def attempt(case: dict[str, Any]) -> None:
    p, optimizer = trained(case)
    if case["by_hand"]:
        spoiled(optimizer.state[p], case)
    else:
        stored = copy.deepcopy(optimizer.state_dict())
        spoiled(stored["state"][0], case)
        before = copy.deepcopy(optimizer.state_dict()["state"][0])
        try:
            optimizer.load_state_dict(stored)
        except ValueError:
            after = optimizer.state_dict()["state"][0]
            assert all(torch.equal(after[name], value) for name, value in before.items()), "it changed"
            raise
        except Exception as error:
            raise AssertionError(f"loading raised {type(error).__name__}") from error
    held = p.detach().clone()
    try:
        if case["then"] == "flush":
            optimizer.flush()
        elif case["then"] == "begin_step":
            optimizer.begin_step(p)(
                torch.arange(min(1, len(p))), torch.ones(min(1, len(p)), *p.shape[1:]).to(p)
            )
        else:
            p.grad = gradient(p, case["then"])
            optimizer.step()
    except ValueError:
        assert torch.equal(p, held), "a refused step moved the table"
        raise
