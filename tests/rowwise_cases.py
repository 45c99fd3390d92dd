"""States and gradients for a step of row-wise AdamW, and a square root that has the bits of a GPU's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEPS = 4  # that were taken


def exact_sqrt(x: Tensor) -> Tensor:
    """PyTorch's square root on the CPU is off by the last bit in a fifth of all numbers; a GPU's is not."""
    return torch.from_numpy(np.sqrt(x.numpy()))


def make_state(
    seed: int = 0,
    N: int = 5,
    R: int = 2,
    D: int = 6,
    table: torch.dtype = torch.float32,
    momentum: torch.dtype | None = torch.float32,
    by_row: bool = False,
    below_one: bool = False,
) -> dict[str, Any]:
    """State of a table in the middle of training, by `rowwise_adamw`'s names.

    Args:
        below_one: keep weights below 1, where bfloat16's steps are no larger than its tolerance: for a table
            that depends on a sum over a row.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if below_one else torch.randn
    weights, moment, squares = (f(N, R, D, generator=generator) for f in (draw, torch.randn, draw))
    if below_one:
        weights = weights * 1.8 - 0.9
    else:
        squares = squares.square()
    log1 = -800.0 if momentum is None else math.log(0.9)  # as RowwiseAdamW writes it
    logarithms = torch.tensor([log1, math.log(0.99), math.log(1 - 1e-3)], dtype=torch.float64)
    return {
        "table": weights.to(table),
        "exp_avg": None if momentum is None else moment.to(momentum),
        "exp_avg_sq": squares.mean(2) if by_row else squares,
        "last_step": torch.randint(0, STEPS, (N,), generator=generator, dtype=torch.int32),
        "history": torch.arange(STEPS + 1, dtype=torch.float64)[:, None] * logarithms,
        "step": STEPS,
    }


def make_gradient(
    seed: int, N: int, R: int, D: int, touched: int, dtype: torch.dtype, gathered: bool
) -> dict[str, Tensor | None]:
    """The gradient of some rows, or, `gathered`, one to three values for each, and where they stand."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(N, generator=generator)[:touched]
    counts = torch.randint(1, 4, (touched,), generator=generator)
    total = int(counts.sum()) if gathered else touched
    return {
        "rows": rows,
        "values": torch.randn(total, R, D, generator=generator).to(dtype),
        "places": torch.randperm(total, generator=generator) if gathered else None,
        "starts": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) if gathered else None,
    }
