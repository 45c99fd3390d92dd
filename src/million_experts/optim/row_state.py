"""What RowwiseAdamW keeps for a table: moments, each row's last step, the factors of all steps so far.

Where beta1 is 0, the first moment is the gradient, and the second alone is kept.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from million_experts.ops.backends import advise_huge_pages

# exp(-800) is 0 in float64, and sums of it stay exact enough; the logarithm of a beta of 0 would not.
_LEAST_LOGARITHM = -800.0
_FIRST_HISTORY = 256

#: What a state holds beside the count of steps.
TENSORS = ("exp_avg", "exp_avg_sq", "last_step", "history")


def _zeros(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only where they are written to: those of torch are written at once."""
    shape = tuple(shape)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    zeros = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
    advise_huge_pages(zeros)
    return zeros


def start_rows(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """A state for sparse gradients, made of that of dense ones if there is any."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    momentum = group["momentum_dtype"] or dtype
    by_row = group["second_moment"] == "row" and p.dim() > 1
    with_momentum = group["betas"][0] != 0  # without, the first moment is the gradient: nothing to keep
    if state:
        if with_momentum:
            state["exp_avg"] = state["exp_avg"].to(momentum).contiguous()
        else:
            del state["exp_avg"]
        squares = state["exp_avg_sq"].to(dtype)
        # Means and moving averages change places, so this is what "row" would have kept.
        state["exp_avg_sq"] = squares.mean(-1) if by_row else squares.contiguous()
    else:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        if with_momentum:
            state["exp_avg"] = _zeros(p.shape, momentum, p.device)
        state["exp_avg_sq"] = _zeros(p.shape[:-1] if by_row else p.shape, dtype, p.device)
    step = int(state["step"])
    state["last_step"] = torch.full((len(p),), step, dtype=torch.int32, device=p.device)
    # Before `step` no row has missed anything.
    length = max(_FIRST_HISTORY, 2 * step)
    state["history"] = torch.zeros(length, 3, dtype=torch.float64, device=p.device)


def record(state: dict[str, Any], step: int, group: dict[str, Any]) -> None:
    history = state["history"]
    if step >= len(history):
        state["history"] = torch.cat([history, torch.zeros_like(history)])
        history = state["history"]
    factors = [max(math.log(beta), _LEAST_LOGARITHM) if beta else _LEAST_LOGARITHM for beta in group["betas"]]
    factors.append(math.log1p(-float(group["lr"]) * group["weight_decay"]))
    history[step] = history[step - 1] + torch.tensor(factors, dtype=torch.float64, device=history.device)


def merge_rows(rows: Tensor, N: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows [n], each once, and where each one's values are: places and starts [n + 1], None if ascending.

    Raises:
        ValueError: a row is not one of the table's N.
    """
    ascending = bool((rows[1:] > rows[:-1]).all())
    ordered, places = (rows, None) if ascending else torch.sort(rows, stable=True)
    if len(rows) and (int(ordered[0]) < 0 or int(ordered[-1]) >= N):
        raise ValueError(
            f"rows of a sparse gradient must be in 0 ... {N - 1}, got {ordered[[0, -1]].tolist()}"
        )
    if places is None:
        return ordered, None, None
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    return distinct, places, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def has_rows(state: dict[str, Any]) -> bool:
    """Whether a state is of rows; otherwise it is that of torch's AdamW, or empty."""
    return "last_step" in state or "history" in state


def of_rows(p: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Table and moments as [N, R, D]; the second [N, R] where it is one number for the last dimension.

    The first is None where none is kept.
    """
    D = p.shape[-1] if p.dim() > 1 else 1
    R = math.prod(p.shape[1:]) // D if D else 0
    squares = state["exp_avg_sq"]
    by_row = p.dim() > 1 and squares.dim() < p.dim()
    shape = len(p), R, D
    return (
        p.detach().view(shape),
        state["exp_avg"].view(shape) if "exp_avg" in state else None,
        squares.view(shape[:2] if by_row else shape),
    )
