"""The experts by Triton kernels, tiles of tokens against blocks of experts on tensor cores.

Shapes as in `reference`. Where a tile's tokens share experts enough, all tokens meet all experts: three
matrix products, of which what was picked is kept. Between them and the pairs stands a matrix [tokens, N], for
so many tokens at a time that it fits in SCRATCH_BYTES. Configurations that are tried out do not change the
sizes of tiles, and so move no sum of ours; whether the bits of a tile's product follow from its sizes alone,
only a GPU can tell (`tests/gpu`).

What is not finite stays with the tokens and experts that it belongs to, though a product with zero would
spread it over a tile: where a row that enters a sum holds such a value, it enters as zeros, and the weights
of those who picked it become NaN. A pick whose weight is zero has minus zero, which no sum notices.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from million_experts.ops.reference import SCRATCH_BYTES
from million_experts.ops.triton_launch import INTERPRETED, registers, tuned

# Tokens, experts or columns of a tile, and how many products are summed at a time.
TILE_TOKENS = 64
TILE_EXPERTS = 64
TILE_COLUMNS = 64
DEPTH = 32

# Programs that keep a large GPU busy: the table's gradient of a small pool is summed in parts up to that
# many.
ENOUGH_PROGRAMS = 512

# Tiles of float32 have 16 KiB a stage at most: three stay below the 64 KiB of the smallest target.
TILE_CONFIGS = [
    triton.Config({}, num_warps=warps, num_stages=stages)
    for warps, stages in ((4, 3), (4, 2), (8, 3), (8, 2))
]


def _usable_for_dots(configs, named_arguments, **constants):
    """A width that is no multiple of 16 leaves a float32 tile no room in the registers of four warps."""
    return [c for c in configs if c.num_warps == 8] if constants["WIDE"] else configs


def _usable_for_mix(configs, named_arguments, **constants):
    """Nor does a number of experts that is no multiple of 16, on sm_80."""
    return [c for c in configs if c.num_warps == 8] if named_arguments["N"] % 16 else configs


# Picks of a token that are compared with one another at a time.
SPREAD = 32


@triton.jit
def _finite(rows, weights):
    """Rows [n, D] that enter a sum with weights [T, n]; see the head of the file."""
    broken = tl.max((rows - rows != 0).to(tl.int32), 1) > 0
    picked = weights.to(tl.int32, bitcast=True) != 0
    weights = tl.where(broken[None, :] & picked, float("nan"), weights)
    return tl.where(broken[:, None], 0.0, rows), weights


@tuned(TILE_CONFIGS, key=["D"], usable=_usable_for_dots)
@triton.jit
def tile_dots_kernel(
    source,  # [T, D]
    table,  # [N, R, D], `stride` from one expert to the next
    dense,  # [T, N]
    T,
    N,
    D,
    stride,
    offset,  # from an expert to its row
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program multiplies a tile of tokens with a row of each expert of a block."""
    blocks = tl.cdiv(N, TILE_N)
    t = (tl.program_id(0) // blocks * TILE_T + tl.arange(0, TILE_T)).to(tl.int64)
    n = (tl.program_id(0) % blocks * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)
    total = tl.zeros((TILE_T, TILE_N), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = tl.load(source + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        rows = table + offset + n[:, None] * stride + d[None, :]
        rows = tl.load(rows, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        if WIDE:  # else both are narrow: their products are exact in float32
            x, rows = x.to(tl.float32), rows.to(tl.float32)
        total = tl.dot(x, tl.trans(rows), total, input_precision=PRECISION)
    tl.store(dense + t[:, None] * N + n[None, :], total, mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def spread_kernel(
    weights,  # [T, K]
    indices,  # [T, K]
    dense,  # [T, N], zeros
    K,
    N,
    SPREAD: tl.constexpr,
):
    """One program puts SPREAD weights of a token where its experts are; those of one expert are summed.

    Minus zero stands for zero, so that a pick differs from none.
    """
    chunks = tl.cdiv(K, SPREAD)
    t = (tl.program_id(0) // chunks).to(tl.int64)
    k = tl.program_id(0) % chunks * SPREAD + tl.arange(0, SPREAD)
    own = tl.load(indices + t * K + k, mask=k < K, other=-1)
    total = tl.zeros((SPREAD,), tl.float32)
    for start in range(0, K, SPREAD):
        at = start + tl.arange(0, SPREAD)
        others = tl.load(indices + t * K + at, mask=at < K, other=-1)
        weight = tl.load(weights + t * K + at, mask=at < K, other=0.0)
        total += tl.sum(tl.where(own[:, None] == others[None, :], weight[None, :], 0.0), 1)
    # By its bits: Triton takes the literal -0.0 for 0.0.
    bits = tl.where(total == 0, -0x80000000, total.to(tl.int32, bitcast=True))
    total = bits.to(tl.float32, bitcast=True)
    # Picks of one expert write the same number.
    tl.store(dense + t * N + own, total, mask=k < K)


@tuned(TILE_CONFIGS, key=["D", "N", "TWO"], usable=_usable_for_mix)
@triton.jit
def tile_mix_kernel(
    dense,  # [T, N]
    second_dense,
    table,
    out,  # [T, D]
    T,
    N,
    D,
    stride,
    offset,
    second_offset,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_D: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program sums TILE_D columns of a row, or two, of all experts, for a tile of tokens."""
    chunks = tl.cdiv(D, TILE_D)
    t = (tl.program_id(0) // chunks * TILE_T + tl.arange(0, TILE_T)).to(tl.int64)
    d = tl.program_id(0) % chunks * TILE_D + tl.arange(0, TILE_D)
    total = tl.zeros((TILE_T, TILE_D), tl.float32)
    for slot in tl.static_range(2 if TWO else 1):
        for start in range(0, N, DEPTH):
            n = (start + tl.arange(0, DEPTH)).to(tl.int64)
            weights = (second_dense if slot == 1 else dense) + t[:, None] * N + n[None, :]
            weights = tl.load(weights, mask=(t < T)[:, None] & (n < N)[None, :], other=0.0)
            rows = table + (second_offset if slot == 1 else offset) + n[:, None] * stride + d[None, :]
            rows = tl.load(rows, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            rows, weights = _finite(rows, weights)
            total = tl.dot(weights, rows, total, input_precision=PRECISION)
    out += t[:, None] * D + d[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])


@tuned(TILE_CONFIGS, key=["D", "N"])
@triton.jit
def tile_table_kernel(
    source,  # [T, D]
    dense,  # [T, N]
    parts,  # [programs along the tokens, N, D]
    T,
    N,
    D,
    tokens_each,  # tokens that a program sums over
    PRECISION: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program sums TILE_D columns of some tokens for each expert of a block."""
    chunks, blocks = tl.cdiv(D, TILE_D), tl.cdiv(N, TILE_N)
    d = tl.program_id(0) % chunks * TILE_D + tl.arange(0, TILE_D)
    n = (tl.program_id(0) // chunks % blocks * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)
    part = tl.program_id(0) // chunks // blocks
    last = tl.minimum((part + 1) * tokens_each, T)
    total = tl.zeros((TILE_N, TILE_D), tl.float32)
    for start in range(part * tokens_each, last, DEPTH):
        t = (start + tl.arange(0, DEPTH)).to(tl.int64)
        # [experts, tokens], read along the experts, which lie side by side
        weights = dense + t[None, :] * N + n[:, None]
        weights = tl.load(weights, mask=(n < N)[:, None] & (t < last)[None, :], other=0.0)
        rows = source + t[:, None] * D + d[None, :]
        rows = tl.load(rows, mask=(t < last)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        rows, weights = _finite(rows, weights)
        total = tl.dot(weights, rows, total, input_precision=PRECISION)
    parts += (part.to(tl.int64) * N + n)[:, None] * D + d[None, :]
    tl.store(parts, total, mask=(n < N)[:, None] & (d < D)[None, :])


def precision() -> str:
    """How float32 matrices are multiplied with float32's precision: natively where matrix units can."""
    if INTERPRETED or triton.runtime.driver.active.get_current_target().backend == "hip":
        return "ieee"
    return "tf32x3"  # NVIDIA's take 11 bits a factor: each factor is cut in two, for three products


def tokens_of_a_part(T: int, N: int, D: int) -> int:
    """Tokens that a program of `tile_table_kernel` sums over."""
    programs = triton.cdiv(N, TILE_EXPERTS) * triton.cdiv(D, TILE_COLUMNS)
    return triton.cdiv(triton.cdiv(T, DEPTH), max(1, ENOUGH_PROGRAMS // programs)) * DEPTH


class ByTiles:
    """All tokens meet all experts, those that they picked and those that they did not."""

    def __init__(self, indices: Tensor, num_experts: int):
        self.indices, self.num_experts = indices, num_experts

    def _parts(self, matrices: int) -> Iterator[slice]:
        """Tokens whose matrices [N] fit in SCRATCH_BYTES, at least a tile of them."""
        fitting = SCRATCH_BYTES // (4 * matrices * self.num_experts)
        step = max(1, fitting // TILE_TOKENS) * TILE_TOKENS
        return (slice(first, first + step) for first in range(0, len(self.indices), step))

    def _spread(self, weights: Tensor, tokens: slice) -> Tensor:
        """[T, N]: weights [T, K] of some tokens at their experts, zeros elsewhere."""
        weights, indices = weights[tokens], self.indices[tokens]
        (T, K), N = indices.shape, self.num_experts
        dense = weights.new_zeros(T, N)
        spread_kernel[(T * triton.cdiv(K, SPREAD),)](weights, indices, dense, K, N, SPREAD=SPREAD)
        return dense

    def dots(self, source: Tensor, experts: Tensor, slots: tuple[int, ...]) -> Tensor:
        """See `ByToken.dots`."""
        (T, K), (N, _, D) = self.indices.shape, experts.shape
        out = source.new_empty(len(slots), T, K, dtype=torch.float32)
        wide = source.dtype != experts.dtype or source.dtype == torch.float32
        for tokens in self._parts(1):
            some, indices = source[tokens], self.indices[tokens]
            dense = out.new_empty(len(some), N)
            grid = (triton.cdiv(len(some), TILE_TOKENS) * triton.cdiv(N, TILE_EXPERTS),)
            for slot, place in zip(slots, out, strict=True):
                tile_dots_kernel[grid](
                    some, experts, dense, len(some), N, D, experts.stride(0), slot * experts.stride(1),
                    WIDE=wide, PRECISION=precision(), TILE_T=TILE_TOKENS, TILE_N=TILE_EXPERTS, DEPTH=DEPTH,
                    **registers(),
                )  # fmt: skip
                torch.gather(dense, 1, indices, out=place[tokens])
        return out

    def mix(
        self, weights: tuple[Tensor, ...], experts: Tensor, slots: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """See `ByToken.mix`."""
        N, _, D = experts.shape
        out = experts.new_empty(len(self.indices), D, dtype=dtype)
        offsets = [slot * experts.stride(1) for slot in slots]
        for tokens in self._parts(len(slots)):
            dense = [self._spread(of_row, tokens) for of_row in weights]
            T = len(dense[0])
            tile_mix_kernel[(triton.cdiv(T, TILE_TOKENS) * triton.cdiv(D, TILE_COLUMNS),)](
                dense[0], dense[-1], experts, out[tokens], T, N, D, experts.stride(0), offsets[0],
                offsets[-1], TWO=len(slots) == 2, PRECISION=precision(), TILE_T=TILE_TOKENS,
                TILE_D=TILE_COLUMNS, DEPTH=DEPTH, **registers(),
            )  # fmt: skip
        return out

    def table_gradient(self, x: Tensor, grad_y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """See `ByToken.table_gradient`."""
        R, N, D = len(weights), self.num_experts, x.shape[1]
        total = weights.new_zeros(N, R, D)
        programs = triton.cdiv(N, TILE_EXPERTS) * triton.cdiv(D, TILE_COLUMNS)
        for tokens in self._parts(1):
            for slot, of_row in enumerate(weights):
                dense, source = self._spread(of_row, tokens), (grad_y if slot == 1 else x)[tokens]
                T = len(dense)
                each = tokens_of_a_part(T, N, D)
                parts = weights.new_empty(triton.cdiv(T, each), N, D)
                tile_table_kernel[(len(parts) * programs,)](
                    source, dense, parts, T, N, D, each,
                    PRECISION=precision(), TILE_N=TILE_EXPERTS, TILE_D=TILE_COLUMNS, DEPTH=DEPTH,
                    **registers(),
                )  # fmt: skip
                total[:, slot] += parts.sum(0)
        return total.to(dtype)
