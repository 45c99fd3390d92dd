"""AdamW for the touched rows of a table as a Triton kernel.

A program brings one row up to date: it reads and writes each of the row's numbers once, whatever the row has
missed. Nothing is contracted or approximated, so the bits are the reference's, but for the mean of squares
where the second moment is kept by row, whose order of summation differs.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from million_experts.ops import reference_rowwise
from million_experts.ops.triton_launch import device_of

# Wider rows and float64 go to the reference.
MOST_D = 8192

# Numbers of an expert that are updated at a time where each has a second moment of its own: 8 a thread.
MOST_PIECE = 4096


@triton.jit
def _random_bits(key, row, column):
    """uint32 for each column, those of `reference_rowwise.random_bits`."""
    z = row.to(tl.uint64) * 0x9E3779B97F4A7C15 + key
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    h = (column.to(tl.uint32) * 0x9E3779B1) ^ z.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = ((h ^ (h >> 13)) + (z >> 32).to(tl.uint32)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _round_to(x, dtype: tl.constexpr, bits, STOCHASTIC: tl.constexpr):
    """x in `dtype`; with 16 random bits float32 becomes bfloat16 by adding them below those kept."""
    if STOCHASTIC and dtype == tl.bfloat16:
        raw = x.to(tl.uint32, bitcast=True)
        moved = ((raw + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return tl.where((raw & 0x7F800000) != 0x7F800000, moved, x.to(tl.bfloat16))
    return x.to(dtype)


@triton.jit(do_not_specialize=["step", "missed_to", "key"])
def adamw_kernel(
    table,
    exp_avg,  # None where beta1 is 0: the first moment is the gradient
    exp_avg_sq,
    last_step,
    history,
    rows,
    values,
    places,
    starts,
    step,
    missed_to,  # the step whose end a row is brought to before this step's gradient
    beta1: tl.float64,
    beta2: tl.float64,
    keep_table: tl.float64,  # 1 - lr * weight_decay
    share1,  # 1 - beta1
    share2,
    root_scale,  # sqrt(1 - beta2 ** step)
    rate,  # lr / (1 - beta1 ** step)
    eps,
    key: tl.uint64,
    PIECE,  # numbers that are updated at a time: one of the R rows if BY_ROW, else any part of all of them
    NUMBERS,  # R * D, of an expert
    WITH_GRADIENT: tl.constexpr,  # else: all rows, no gradient
    GATHERED: tl.constexpr,  # a row's gradient is a sum of values at `places`
    BY_ROW: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i) if WITH_GRADIENT else i
    last = tl.load(last_step + row)
    if WITH_GRADIENT or last < step:
        before, now = history + last.to(tl.int64) * 3, history + missed_to.to(tl.int64) * 3
        keep1 = tl.exp(tl.load(now) - tl.load(before))
        keep2 = tl.exp(tl.load(now + 1) - tl.load(before + 1))
        keep_p = tl.exp(tl.load(now + 2) - tl.load(before + 2))
        if WITH_GRADIENT:
            keep1 *= tl.full((), beta1, tl.float64)
            keep2 *= tl.full((), beta2, tl.float64)
            keep_p *= tl.full((), keep_table, tl.float64)
        keep1, keep2, keep_p = keep1.to(tl.float32), keep2.to(tl.float32), keep_p.to(tl.float32)
        column = tl.arange(0, BLOCK)
        if WITH_GRADIENT and GATHERED:
            begin, end = tl.load(starts + i), tl.load(starts + i + 1)
        # Nothing here is a constant: unrolled, the loop would fetch all pieces ahead, and spill.
        for piece in range(tl.cdiv(NUMBERS, PIECE)):
            start = piece * PIECE
            mask = column < tl.minimum(PIECE, NUMBERS - start)
            at = row * NUMBERS + start + column
            if exp_avg is not None:
                m = tl.load(exp_avg + at, mask=mask, other=0.0).to(tl.float32) * keep1
            p = tl.load(table + at, mask=mask, other=0.0).to(tl.float32) * keep_p
            if BY_ROW:
                square = exp_avg_sq + row * (NUMBERS // PIECE) + piece
                v = tl.load(square) * keep2
                tl.debug_barrier()  # all warps have read it before one writes it
            else:
                v = tl.load(exp_avg_sq + at, mask=mask, other=0.0) * keep2
            if WITH_GRADIENT:
                if GATHERED:
                    grad = tl.zeros((BLOCK,), tl.float32)
                    for place in range(begin, end):
                        source = tl.load(places + place) * NUMBERS + start + column
                        grad += tl.load(values + source, mask=mask, other=0.0).to(tl.float32)
                else:
                    source = values + i * NUMBERS + start + column
                    grad = tl.load(source, mask=mask, other=0.0).to(tl.float32)
                if exp_avg is not None:
                    m += share1 * grad
                else:
                    m = grad
                squares = grad * grad
                if BY_ROW:
                    squares = tl.sum(squares, 0) / PIECE
                v += share2 * squares
                root = tl.div_rn(tl.sqrt_rn(v), root_scale) + eps
                p -= tl.div_rn(rate * m, root)
            bits = _random_bits(key.to(tl.uint64), row, start + column)
            if exp_avg is not None:
                kept = _round_to(m, exp_avg.dtype.element_ty, bits & 0xFFFF, STOCHASTIC)
                tl.store(exp_avg + at, kept, mask=mask)
            tl.store(table + at, _round_to(p, table.dtype.element_ty, bits >> 16, STOCHASTIC), mask=mask)
            if BY_ROW:
                tl.store(square, v)
            else:
                tl.store(exp_avg_sq + at, v, mask=mask)
        tl.debug_barrier()  # all warps have read the last step before one writes it
        tl.store(last_step + row, step)


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
    """See `reference_rowwise.rowwise_adamw`; the tensors that it changes must be contiguous."""
    N, R, D = table.shape
    if D > MOST_D or exp_avg_sq.dtype != torch.float32 or table.dtype == torch.float64:
        return reference_rowwise.rowwise_adamw(
            table, exp_avg, exp_avg_sq, last_step, history, step, rows, values, places, starts, lr, betas,
            eps, weight_decay, key,
        )  # fmt: skip
    changed = (table, exp_avg, exp_avg_sq, last_step, history)
    assert all(t is None or t.is_contiguous() for t in changed), "what is changed in place must be contiguous"
    with_gradient = rows is not None and values is not None
    programs = len(rows) if rows is not None and values is not None else N
    if programs == 0:
        return None
    if values is not None and values.dtype == torch.float64:
        values = values.float()
    rows, values, places, starts = (
        t if t is None else t.contiguous() for t in (rows, values, places, starts)
    )
    by_row = exp_avg_sq.dim() == 2
    piece = max(1, D if by_row else min(MOST_PIECE, R * D))
    block = triton.next_power_of_2(piece)
    missed_to = step - 1 if with_gradient else step
    with device_of(table):
        adamw_kernel[(programs,)](
            table, exp_avg, exp_avg_sq, last_step, history, rows, values, places, starts, step, missed_to,
            betas[0], betas[1], 1 - lr * weight_decay, 1 - betas[0], 1 - betas[1],
            math.sqrt(1 - betas[1] ** step), lr / (1 - betas[0] ** step), eps, key or 0,
            piece, R * D, WITH_GRADIENT=with_gradient, GATHERED=places is not None and starts is not None,
            BY_ROW=by_row, STOCHASTIC=key is not None, BLOCK=block,
            num_warps=_warps(block), enable_fp_fusion=False,
        )  # fmt: skip
    return None


def _warps(block: int) -> int:
    """8 numbers of a row a thread, 16 bytes of bfloat16, until a row has enough threads."""
    return min(16, max(1, block // 256))
