"""AdamW for the touched rows of a table, in plain PyTorch.

Shapes: N rows of a table [N, R, D], n of them touched. `history` [steps + 1, 3] float64 has the logarithms of
beta1, beta2 and 1 - lr * weight_decay, summed over the steps so far: the difference of two of its rows is the
logarithm of what a row of the table has missed between them.
"""

import math

import torch
from torch import Tensor

_CHUNK_BYTES = 16 * 2**20
_MASK_32 = 2**32 - 1


def rowwise_adamw(
    table: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    history: Tensor,
    step: int,
    rows: Tensor | None,
    values: Tensor | None,
    places: Tensor | None,
    starts: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    key: int | None,
) -> None:
    """One step of AdamW for some rows of a table, after what each has missed; changes the first four tensors.

    Args:
        table: [N, R, D].
        exp_avg: [N, R, D], float32 or bfloat16; float64 for a float64 table. None if beta1 is 0: the first
            moment of a step is then its gradient.
        exp_avg_sq: [N, R, D], or [N, R] for one number a row of D; float32, float64 for a float64 table.
        last_step: [N] int32, the step that each row was brought up to.
        history: [> step, 3] float64, see above; filled up to `step`.
        step: the step that is taken, from 1.
        rows: [n] int64, each row once. None, and no values: brings all rows up to `step` without a gradient.
        values: [any, R, D], gradients.
        places, starts: int64; the gradient of rows[i] is the sum of values[p] for p in
            places[starts[i] : starts[i + 1]], in that order. Both None: it is values[i].
        lr, betas, eps, weight_decay: of this step.
        key: a number below 2**64 that chooses the random bits by which bfloat16 is rounded; None rounds to
            nearest.
    """
    dtype = exp_avg_sq.dtype
    chosen = (last_step < step).nonzero()[:, 0] if rows is None or values is None else rows
    size = max(1, _CHUNK_BYTES // max(1, 8 * table[:1].numel()))
    for start in range(0, len(chosen), size):
        at = chosen[start : start + size]
        missed_to = step if values is None else step - 1
        missed = (history[missed_to] - history[last_step[at].long()]).exp()
        keep1, keep2, keep_table = missed.unbind(1)
        if values is not None:
            keep1, keep2 = keep1 * betas[0], keep2 * betas[1]
            keep_table = keep_table * (1 - lr * weight_decay)
        keep1, keep2, keep_table = (k.to(dtype).view(-1, 1, 1) for k in (keep1, keep2, keep_table))
        m = None if exp_avg is None else exp_avg[at].to(dtype) * keep1
        v = exp_avg_sq[at] * keep2.view(-1, *[1] * (exp_avg_sq.dim() - 1))
        p = table[at].to(dtype) * keep_table
        if values is not None:
            grad = _gradients(values, places, starts, start, len(at)).to(dtype)
            m = grad if m is None else m + (1 - betas[0]) * grad
            squares = grad.square() if v.dim() == 3 else grad.square().mean(2)
            v += (1 - betas[1]) * squares
            root = v.sqrt() / math.sqrt(1 - betas[1] ** step) + eps
            p -= lr / (1 - betas[0] ** step) * m / (root if v.dim() == 3 else root[:, :, None])
        bits = None if key is None else random_bits(key, at, p[:1].numel()).view(p.shape)
        if exp_avg is not None and m is not None:
            exp_avg[at] = round_to(m, exp_avg.dtype, None if bits is None else bits & 0xFFFF)
        exp_avg_sq[at] = v
        table[at] = round_to(p, table.dtype, None if bits is None else bits >> 16)
        last_step[at] = step


def _gradients(
    values: Tensor, places: Tensor | None, starts: Tensor | None, first: int, count: int
) -> Tensor:
    if places is None or starts is None:
        return values[first : first + count]
    bounds = starts[first : first + count + 1]
    rows = torch.repeat_interleave(torch.arange(count, device=values.device), bounds.diff())
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    total = torch.zeros(count, *values.shape[1:], dtype=dtype, device=values.device)
    return total.index_add_(0, rows, values[places[bounds[0] : bounds[-1]]].to(dtype))


def mix64(z: int) -> int:
    """The finaliser of splitmix64: every bit of the result depends on every bit of a number below 2**64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z


def _shifted(z: Tensor, count: int) -> Tensor:
    return (z >> count) & (2 ** (64 - count) - 1)  # int64 shifts its sign in


def random_bits(key: int, rows: Tensor, width: int) -> Tensor:
    """[n, width] int64 below 2**32, a function of the key, the row and the column alone.

    int64 arithmetic wraps as the kernels' unsigned does, so these are their bits.
    """
    z = rows * _signed(0x9E3779B97F4A7C15) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = (z ^ _shifted(z, 31))[:, None]
    h = (torch.arange(width, device=rows.device) * 0x9E3779B1 & _MASK_32) ^ (z & _MASK_32)
    h = (h ^ h >> 16) * 0x85EBCA6B & _MASK_32
    h = ((h ^ h >> 13) + _shifted(z, 32) & _MASK_32) * 0xC2B2AE35 & _MASK_32
    return h ^ h >> 16


def round_to(x: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """x in `dtype`; float32 becomes bfloat16 by adding 16 random bits, if there are any, below those kept."""
    if bits is None or dtype != torch.bfloat16 or x.dtype != torch.float32:
        return x.to(dtype)
    moved = (x.view(torch.int32).long() & _MASK_32) + bits
    rounded = (moved & ~0xFFFF).where(moved < 2**31, (moved & ~0xFFFF) - 2**32).to(torch.int32)
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(dtype)
