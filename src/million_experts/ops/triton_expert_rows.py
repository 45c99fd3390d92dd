"""The experts by Triton kernels, token by token, and for the table's gradient row by row.

Shapes as in `reference`, P = T*K pairs of a token and an expert. In what order sums run is fixed by the
shapes: configurations that are tried out differ in how much is under way at a time, and never move a sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from million_experts.ops.reference import SCRATCH_BYTES
from million_experts.ops.triton_launch import registers, tuned

# Pairs that one program sums for a row, at least. An expert that has more, because most tokens chose it, is
# summed in parts of this length by many programs, and the parts are added in their order.
PART = 256

# One warp multiplies a token with rows, so many columns at a time: with as few as two rows of the narrowest
# numbers every lane has 16 bytes of a row, on AMD's 64 lanes too. So lanes share out the columns in the same
# way, and a sum has the same order, however many rows are under way: 4 or 8 KiB of them in float32; 16 spill.
DOTS_COLUMNS = 256
DOTS_CONFIGS = [triton.Config({"ROWS": rows}, num_warps=1) for rows in (4, 8)]

# A column's sum runs over the picks in their order, whatever these are: UNROLL rows are under way at a time.
MIX_CONFIGS = [
    triton.Config({"BLOCK_D": columns, "UNROLL": unroll}, num_warps=warps)
    for columns, unroll, warps in ((256, 8, 1), (256, 4, 1), (128, 8, 1), (512, 8, 2))
]

# Likewise over an expert's pairs in their order. In a pool of a million most experts have no pair or one.
TABLE_CONFIGS = [
    triton.Config({"BLOCK_D": columns, "UNROLL": unroll}, num_warps=warps)
    for columns, unroll, warps in ((256, 4, 1), (256, 1, 1), (128, 4, 1), (512, 2, 2))
]


@tuned(DOTS_CONFIGS, key=["K", "D", "TWO"])
@triton.jit
def dots_kernel(
    source,  # [T, D]
    table,  # [N, R, D], `stride` from one expert to the next
    indices,  # [T, K]
    out,  # [1 or 2, T, K]
    pairs,
    K,
    D,
    stride,
    offset,  # from an expert to its row
    second_offset,
    TWO: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program multiplies a token with ROWS rows, one or two of an expert."""
    BLOCK_K: tl.constexpr = ROWS // 2 if TWO else ROWS
    blocks = tl.cdiv(K, BLOCK_K)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    picked = k < K
    at = t * K + k
    rows = table + tl.load(indices + at, mask=picked, other=0) * stride
    first = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    second = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        x = tl.load(source + t * D + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        pieces = rows[:, None] + columns[None, :]
        mask = picked[:, None] & inside[None, :]
        first += x * tl.load(pieces + offset, mask=mask, other=0.0).to(tl.float32)
        if TWO:
            second += x * tl.load(pieces + second_offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, tl.sum(first, 1), mask=picked)
    if TWO:
        tl.store(out + pairs + at, tl.sum(second, 1), mask=picked)


@tuned(MIX_CONFIGS, key=["K", "D", "TWO"])
@triton.jit
def mix_kernel(
    weights,  # [T, K]
    second_weights,
    table,
    indices,
    out,  # [T, D]
    K,
    D,
    stride,
    offset,
    second_offset,
    TWO: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program sums BLOCK_D columns of a row, or two, of all experts of a token."""
    chunks = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // chunks).to(tl.int64)
    columns = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, K, UNROLL):
        for ahead in tl.static_range(UNROLL):
            picked = start + ahead < K
            at = t * K + start + ahead
            row = table + tl.load(indices + at, mask=picked, other=0) * stride + columns
            mask = columns < tl.where(picked, D, 0)
            weight = tl.load(weights + at, mask=picked, other=0.0)
            total += weight * tl.load(row + offset, mask=mask, other=0.0).to(tl.float32)
            if TWO:
                weight = tl.load(second_weights + at, mask=picked, other=0.0)
                total += weight * tl.load(row + second_offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t * D + columns, total.to(out.dtype.element_ty), mask=columns < D)


@triton.jit
def _sum_pairs(
    x,
    grad_y,
    weights,
    order,
    first,
    last,
    columns,
    pairs,
    K,
    D,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums over the sorted pairs from `first` to `last`, for the rows down, up and gate of their expert."""
    down = tl.zeros((BLOCK_D,), tl.float32)
    up = tl.zeros((BLOCK_D,), tl.float32)
    gate = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, last, UNROLL):
        for ahead in tl.static_range(UNROLL):
            real = start + ahead < last
            pair = tl.load(order + start + ahead, mask=real, other=0)
            at = pair // K * D + columns
            mask = columns < tl.where(real, D, 0)
            token = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
            down += tl.load(weights + pair, mask=real, other=0.0) * token
            up += tl.load(weights + pairs + pair, mask=real, other=0.0) * grad
            if R == 3:
                gate += tl.load(weights + pairs + pairs + pair, mask=real, other=0.0) * token
    return down, up, gate


@triton.jit
def _store_rows(out, i, columns, D, down, up, gate, R: tl.constexpr, HINT: tl.constexpr):
    rows = out + i * R * D + columns
    tl.store(rows, down.to(out.dtype.element_ty), mask=columns < D, cache_modifier=HINT)
    tl.store(rows + D, up.to(out.dtype.element_ty), mask=columns < D, cache_modifier=HINT)
    if R == 3:
        tl.store(rows + D + D, gate.to(out.dtype.element_ty), mask=columns < D, cache_modifier=HINT)


@tuned(TABLE_CONFIGS, key=["D", "R"])
@triton.jit
def table_parts_kernel(
    x,
    grad_y,
    weights,
    order,
    starts,
    part_starts,
    owners,
    parts,  # [most parts, R, D]
    experts,
    pairs,
    K,
    D,
    part,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program sums BLOCK_D columns over a part of the pairs of an expert that has many."""
    chunks = tl.cdiv(D, BLOCK_D)
    j = (tl.program_id(0) // chunks).to(tl.int64)
    columns = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    if j < tl.load(part_starts + experts):  # as many programs as there may be parts
        i = tl.load(owners + j)
        first = tl.load(starts + i) + (j - tl.load(part_starts + i)) * part
        last = tl.minimum(first + part, tl.load(starts + i + 1))
        down, up, gate = _sum_pairs(
            x, grad_y, weights, order, first, last, columns, pairs, K, D, R, BLOCK_D, UNROLL
        )
        _store_rows(parts, j, columns, D, down, up, gate, R, "")


@tuned(TABLE_CONFIGS, key=["D", "R"])
@triton.jit
def table_rows_kernel(
    x,
    grad_y,
    weights,  # [R, T, K]
    order,  # [P]: the pairs, sorted by expert
    starts,  # [experts + 1]: where each expert's begin
    part_starts,  # [experts + 1]: where each expert's parts begin
    parts,
    values,  # [experts, R, D]
    pairs,
    K,
    D,
    PARTED: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program sums BLOCK_D columns over the pairs of an expert, or over its parts."""
    chunks = tl.cdiv(D, BLOCK_D)
    i = (tl.program_id(0) // chunks).to(tl.int64)
    columns = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(starts + i), tl.load(starts + i + 1)
    if PARTED:
        first_part, last_part = tl.load(part_starts + i), tl.load(part_starts + i + 1)
        last = tl.where(last_part > first_part, first, last)
    down, up, gate = _sum_pairs(
        x, grad_y, weights, order, first, last, columns, pairs, K, D, R, BLOCK_D, UNROLL
    )
    if PARTED:
        inside = columns < D
        for j in range(first_part, last_part):
            rows = parts + j * R * D + columns
            down += tl.load(rows, mask=inside, other=0.0)
            up += tl.load(rows + D, mask=inside, other=0.0)
            if R == 3:
                gate += tl.load(rows + D + D, mask=inside, other=0.0)
    # Streamed: the rows written would push tokens and gradients, which are read again, out of the cache.
    _store_rows(values, i, columns, D, down, up, gate, R, ".cs")


class ByToken:
    """Each token meets its experts, wherever they lie."""

    def __init__(self, indices: Tensor, num_experts: int):
        self.indices, self.num_experts = indices, num_experts

    def dots(self, source: Tensor, experts: Tensor, slots: tuple[int, ...]) -> Tensor:
        """[len(slots), T, K] float32: source[t] times one or two rows, `slots`, of expert indices[t, k]."""
        (T, K), D = self.indices.shape, source.shape[1]
        out = source.new_empty(len(slots), T, K, dtype=torch.float32)
        offsets = [slot * experts.stride(1) for slot in slots]
        dots_kernel[lambda config: (T * triton.cdiv(K, config["ROWS"] // len(slots)),)](
            source, experts, self.indices, out, T * K, K, D, experts.stride(0), offsets[0], offsets[-1],
            TWO=len(slots) == 2, BLOCK_D=DOTS_COLUMNS, **registers(),
        )  # fmt: skip
        return out

    def mix(
        self, weights: tuple[Tensor, ...], experts: Tensor, slots: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """[T, D] in `dtype`: for one or two slots, the rows of expert indices[t, k] times weights [T, K]."""
        (T, K), D = self.indices.shape, experts.shape[2]
        out = experts.new_empty(T, D, dtype=dtype)
        offsets = [slot * experts.stride(1) for slot in slots]
        mix_kernel[lambda config: (T * triton.cdiv(D, config["BLOCK_D"]),)](
            weights[0], weights[-1], experts, self.indices, out, K, D, experts.stride(0), offsets[0],
            offsets[-1], TWO=len(slots) == 2, **registers(),
        )  # fmt: skip
        return out

    def table_gradient(self, x: Tensor, grad_y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, R, D] in `dtype`, for `weights` [R, T, K]."""
        chosen, order = sort_pairs(self.indices, self.num_experts)
        experts = torch.arange(self.num_experts + 1, dtype=chosen.dtype, device=chosen.device)
        rows = RowSums(x, grad_y, weights, order, torch.searchsorted(chosen, experts))
        return rows.values(0, self.num_experts, dtype)


def sort_pairs(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Experts of the pairs in ascending order, and the pairs [P]; those of an expert keep their order."""
    narrow = torch.int32 if num_experts < 2**31 else torch.int64  # half the passes of a radix sort
    return indices.flatten().to(narrow).sort(stable=True)


class RowSums:
    """Sums over the pairs of each of M experts: order[p] for starts[m] <= p < starts[m + 1]."""

    def __init__(self, x: Tensor, grad_y: Tensor, weights: Tensor, order: Tensor, starts: Tensor):
        self.sources, self.weights, self.order, self.starts = (x, grad_y), weights, order, starts
        (R, _, K), P, D = weights.shape, len(order), x.shape[1]
        self.length = part_length(P, R, D)
        most = most_parts(P, self.length)
        self.parted = most > 0
        if not self.parted:
            self.part_starts, self.parts = starts, weights  # never read
            return
        counts = starts.diff()
        counts = torch.where(counts > self.length, (counts + self.length - 1) // self.length, 0)
        self.part_starts = torch.zeros_like(starts)
        torch.cumsum(counts, 0, out=self.part_starts[1:])
        at = torch.arange(most, device=starts.device)
        owners = torch.searchsorted(self.part_starts, at, right=True) - 1
        self.parts = weights.new_empty(most, R, D)
        table_parts_kernel[lambda config: (most * triton.cdiv(D, config["BLOCK_D"]),)](
            *self.sources, weights, order, starts, self.part_starts, owners, self.parts, len(counts), P, K, D,
            self.length, R=R,
        )  # fmt: skip

    def values(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """[count, R, D] in `dtype`: the sums of the experts from `first` on."""
        (R, _, K), D = self.weights.shape, self.sources[0].shape[1]
        values = self.weights.new_empty(count, R, D, dtype=dtype)
        table_rows_kernel[lambda config: (count * triton.cdiv(D, config["BLOCK_D"]),)](
            *self.sources, self.weights, self.order, self.starts[first:], self.part_starts[first:],
            self.parts, values, len(self.order), K, D, PARTED=self.parted, R=R,
        )  # fmt: skip
        return values


def most_parts(pairs: int, length: int) -> int:
    """Parts that there may be: how many there are is known on the device alone.

    An expert with more pairs than a part holds has at most twice as many parts as it would fill.
    """
    return 2 * pairs // length if length < pairs else 0


def part_length(pairs: int, R: int, D: int) -> int:
    """Pairs in a part: so many that the parts of all experts fit in SCRATCH_BYTES."""
    return max(PART, triton.cdiv(2 * pairs * R * D * 4, SCRATCH_BYTES))
