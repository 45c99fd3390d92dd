"""A stored state of RowwiseAdamW, or of torch's AdamW, as that of an optimiser's parameters."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from million_experts.ops.checks import check_stored
from million_experts.optim.row_state import TENSORS, has_rows
from million_experts.optim.rowwise_checks import (
    check_history,
    check_last_step,
    check_momentum,
    check_options,
    check_shapes,
    check_state,
    check_step,
)


def fitted_states(
    groups: list[dict[str, Any]], defaults: dict[str, Any], stored: dict[str, Any]
) -> dict[Any, dict[str, Any]]:
    """The stored states, by index, as the groups' parameters take them: on their devices, laid out as they.

    Tensors keep their dtypes; torch's own loading casts them to the parameter's, which would ruin float32
    moments and the counters of a bfloat16 table.

    Raises:
        ValueError: an option or a state that does not fit; the message names the parameter, and what.
    """
    for name, kind in (("param_groups", list), ("state", dict)):
        if not isinstance(stored.get(name), kind):
            raise ValueError(f"a state of an optimiser must have {name}, a {kind.__name__}")
    found: dict[Any, dict[str, Any]] = dict(stored["state"])
    for group in stored["param_groups"]:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError("each of param_groups must be a dict with params, a list")
        if odd := [index for index in group["params"] if not isinstance(index, int | str)]:
            raise ValueError(f"params must name parameters by numbers or texts, got {odd[0]!r}")
    # torch refuses another number of groups or parameters in a sentence of its own, after this.
    for own, group in zip(groups, stored["param_groups"], strict=False):
        options = defaults | group
        check_options(options)
        for p, index in zip(own["params"], group["params"], strict=False):
            if not found.get(index):
                found.pop(index, None)  # none, in whatever form
                continue
            try:
                found[index] = _fitted(p, found[index], options)
            except (ValueError, BufferError) as error:
                raise ValueError(
                    f"the state of parameter {index}, of shape {list(p.shape)}, does not fit: {error}"
                ) from None
    return found


def refuse_misfits(optimizer: Optimizer, stored: dict[str, Any]) -> dict[str, Any]:
    """A pre-hook of `load_state_dict` for torch's fused AdamW, which takes the sizes of a state for granted.

    Raises:
        ValueError: an option or a state that does not fit; the message names the parameter, and what.
    """
    ours = {"second_moment": "element", "momentum_dtype": None, "seed": 0}
    states = fitted_states(optimizer.param_groups, ours | optimizer.defaults, stored)
    for index, state in states.items():
        if isinstance(state, dict) and has_rows(state):
            raise ValueError(f"the state of parameter {index} is of rows: sparse gradients have trained it")
    return stored | {"state": states}


def _fitted(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise ValueError(f"it must be a dict, got {type(state).__name__}")
    check_shapes(p, state)
    check_momentum(state, group)
    if has_rows(state):
        step = check_step(state["step"])
        if not p.is_meta:
            check_last_step(_readable("last_step", state["last_step"]), step)
            check_history(_readable("history", state["history"]), step)
    else:
        check_step(state["step"], most=float("inf"))
    fitted = {name: _placed(name, value, p) for name, value in state.items()}
    count = fitted["step"]  # older versions of torch stored a number; torch's step takes these dtypes alone
    if not isinstance(count, Tensor) or count.dtype not in (torch.float32, torch.float64):
        fitted["step"] = torch.tensor(float(count))
    check_state(p, fitted)
    return fitted


def _placed(name: str, value: Any, p: Tensor) -> Any:
    """A tensor on its parameter's device, laid out as that one; the count of steps stays where it is."""
    if name not in TENSORS:
        return value.to(p.device) if isinstance(value, Tensor) and name != "step" else value
    if type(value) is not Tensor:  # sharded, for example
        return value.to(p.device)
    value = _readable(name, value).to(p.device)
    if value.shape != p.shape:
        return value.contiguous()
    if value.stride() == p.stride() or (value.is_contiguous() and p.is_contiguous()):
        return value
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def _readable(name: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
    check_stored(**{name: value})
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{name} must have memory for each of its numbers, got strides {value.stride()}")
    return value
