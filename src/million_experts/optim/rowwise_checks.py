"""What RowwiseAdamW asks of options, gradients and states, before it changes anything.

A state may come from a file, made for other parameters or by a stranger, or a user may have altered it:
kernels, torch's among them, take the sizes that the parameter has.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from million_experts._arguments import check_choice, is_integer
from million_experts.ops.checks import DTYPES, check_row_state, check_shape, check_stored
from million_experts.optim.row_state import TENSORS, has_rows, of_rows

SECOND_MOMENTS = ("element", "row")
MOMENTUM_DTYPES = (None, torch.bfloat16)
MOST_STEPS = 2**24  # float32, in which torch counts steps, goes no further


def check_options(options: dict[str, Any]) -> None:
    """The options of a group."""
    betas = options["betas"]
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= _number(options[name]) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {options[name]!r}")
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not pair or not all(0.0 <= _number(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {betas!r}")
    check_choice("second_moment", options["second_moment"], SECOND_MOMENTS)
    if options["momentum_dtype"] not in MOMENTUM_DTYPES:
        raise ValueError(f"momentum_dtype must be None or torch.bfloat16, got {options['momentum_dtype']}")
    if not is_integer(options["seed"]):
        raise ValueError(f"seed must be an int, got {options['seed']!r}")
    for name in ("amsgrad", "maximize"):  # of torch's AdamW, whose states are loaded, too
        if options.get(name):
            raise ValueError(f"{name} must be False: RowwiseAdamW has no such option")


def _number(value: Any) -> float:
    """A number, or a tensor of one, as a float; NaN for anything else."""
    plain = isinstance(value, Tensor) and value.numel() == 1 and not (value.is_complex() or value.is_meta)
    if not plain and not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def is_sparse(grad: Tensor) -> bool:
    return grad.layout != torch.strided


def check_form(grad: Tensor) -> None:
    """A sparse gradient, but for its rows."""
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        form = f"{grad.sparse_dim()} sparse dimensions" if grad.layout == torch.sparse_coo else grad.layout
        raise ValueError(f"a sparse gradient must be torch.sparse_coo with 1 sparse dimension, got {form}")
    rows = grad._indices().shape[1]
    check_shape("the values of a sparse gradient", grad._values(), (rows, *grad.shape[1:]))


def check_table(p: Tensor, state: dict[str, Any], group: dict[str, Any], rows: Tensor | None = None) -> None:
    """What a step with a sparse gradient needs.

    Args:
        rows: those that the gradient touches, each once; None for all.
    """
    if p.dtype not in DTYPES:
        raise ValueError(f"a parameter with a sparse gradient must be one of {DTYPES}, got {p.dtype}")
    if not p.is_contiguous():
        raise ValueError(f"a parameter with a sparse gradient must be contiguous, got strides {p.stride()}")
    if p.dtype == torch.float64 and group["momentum_dtype"] is not None:
        raise ValueError(f"momentum_dtype must be None for a float64 table, got {group['momentum_dtype']}")
    if state:
        check_state(p, state, rows)
        check_momentum(state, group)
        if check_step(state["step"]) == MOST_STEPS:
            raise ValueError(f"a table takes at most {MOST_STEPS} steps: go on with a new optimiser")
    if not float(group["lr"]) * group["weight_decay"] < 1:
        raise ValueError(
            f"lr * weight_decay must be below 1, got {float(group['lr'])} * {group['weight_decay']}: "
            "a row cannot catch up with a decay to nothing"
        )


def check_dense(p: Tensor, state: dict[str, Any]) -> None:
    """What a step with a dense gradient needs."""
    if not state:
        return
    check_state(p, state)
    for name in ("exp_avg", "exp_avg_sq") if has_rows(state) else ():
        moment = state.get(name, p)
        if moment.shape != p.shape or moment.dtype != p.dtype:
            raise ValueError(
                "a dense gradient came for a parameter that sparse ones have trained: its state must have "
                f"the parameter's shape and dtype, {tuple(p.shape)} {p.dtype}, but {name} has "
                f"{tuple(moment.shape)} {moment.dtype}"
            )


def check_state(p: Tensor, state: dict[str, Any], rows: Tensor | None = None) -> None:
    """A state that is there: one of rows, where sparse gradients have trained the parameter, or torch's own.

    It costs no more than a step.

    Args:
        rows: those whose last step is looked at; None for all.

    Raises:
        ValueError: something is missing, or does not fit the parameter; the message names it.
    """
    check_shapes(p, state)
    tensors = {name: value for name, value in state.items() if name in TENSORS}
    for name, tensor in tensors.items():
        if tensor.device != p.device:
            raise ValueError(f"{name} must be on the parameter's device, {p.device}, got {tensor.device}")
        if type(tensor) is Tensor and not tensor.is_meta:
            check_stored(**{name: tensor})
    if not has_rows(state):
        return
    for name, tensor in {"the table": p, **tensors}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    step = check_step(state["step"])
    check_row_state(*of_rows(p, state), state["last_step"], state["history"], step)
    if not p.is_meta:
        check_last_step(state["last_step"], step, rows)


def check_shapes(p: Tensor, state: dict[str, Any]) -> None:
    """That a state has what it needs, in shapes and dtypes that fit the parameter. Reads no number in it."""
    rows = has_rows(state)
    needed = ["step", "exp_avg", "exp_avg_sq", *(("last_step", "history") if rows else ())]
    if rows and "exp_avg" not in state:  # trained without momentum
        needed.remove("exp_avg")
    for name in needed:
        if name not in state:
            raise ValueError(f"the state of a parameter must have {', '.join(needed)}, got no {name}")
        value = state[name]
        if name in TENSORS and not (isinstance(value, Tensor) and value.layout == torch.strided):
            kind = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a dense tensor, got {kind}")
        if name in TENSORS and rows and type(value) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"{name} must be a plain tensor, got {type(value).__name__}")
    if rows and (p.dim() == 0 or p.dtype not in DTYPES):
        raise ValueError(f"a state of rows must be of a table, got one of {p.dtype} {list(p.shape)}")
    by_row = rows and p.dim() > 1 and state["exp_avg_sq"].dim() < p.dim()
    for name, shape in (("exp_avg", p.shape), ("exp_avg_sq", p.shape[:-1] if by_row else p.shape)):
        moment = state.get(name)
        if moment is None:
            continue
        check_shape(name, moment, shape)
        if not (moment.is_complex() if p.is_complex() else moment.is_floating_point()):
            raise ValueError(
                f"{name} must be floating-point for a parameter in {p.dtype}, got {moment.dtype}"
            )


def check_momentum(state: dict[str, Any], group: dict[str, Any]) -> None:
    """That a state of rows has a first moment where one is needed."""
    if has_rows(state) and "exp_avg" not in state and group["betas"][0] != 0:
        raise ValueError(
            "the first of betas must stay 0 for a table that was trained without momentum, got "
            f"{group['betas']}: no first moment was kept"
        )


def check_step(step: Any, most: float = MOST_STEPS) -> int:
    """The count of steps that a parameter has taken."""
    if isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta:
        if type(step) is Tensor:
            check_stored(step=step)
        try:
            step = step.item()
        except RuntimeError:  # a class of its own, which says what it holds to its own functions alone
            raise ValueError(f"step must hold a number that can be read, got {type(step).__name__}") from None
    if not (isinstance(step, int | float) and 0 <= step <= most and step == int(step)):
        raise ValueError(f"step must be a whole number from 0 to {most}, got {step}")
    return int(step)


def check_last_step(last_step: Tensor, step: int, rows: Tensor | None = None) -> None:
    """The last steps of the rows, or of all."""
    # To read all numbers in order is quicker than to gather more than a few of them.
    if rows is not None and len(rows) * 16 < len(last_step):
        last_step = last_step[rows]
    if last_step.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(last_step))
    if low < 0 or high > step:
        raise ValueError(f"last_step must lie in 0 ... {step}, got values from {low} to {high}")


def check_history(history: Tensor, step: int) -> None:
    """The factors of the steps so far: sums of logarithms of numbers up to 1."""
    if history.dim() != 2 or len(history) <= step:
        raise ValueError(f"history must have shape [> {step}, 3], got {list(history.shape)}")
    done = history[: step + 1]
    if not (done.isfinite().all() and (done <= 0).all() and (done.diff(dim=0) <= 0).all()):
        raise ValueError(f"history must be finite numbers that never rise, from 0 on, up to step {step}")
