"""The experts by Triton kernels, a tile of tokens against a block of experts, on tensor cores.

Shapes as in `reference`. A tile multiplies all its tokens with all rows of a block and keeps what was picked, or
lays the weights of what was picked into a tile that is otherwise zero. The picks of a token are sorted by expert
beforehand, so that those in a block stand together. Sizes of tiles fix the order of every sum; configurations
that are tried out do not change them.

What is not finite stays with the tokens that picked it: a product with a zero would spread it over the tile. So
rows that hold such a value enter as zeros, and the weights that pick them become NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from million_experts.ops.triton_launch import INTERPRETED, tuned

TILE_TOKENS = 64
BLOCK_EXPERTS = 32
BLOCK_D = 64

# Programs that keep a large GPU busy: the table's gradient of a small pool is summed in parts up to that many.
ENOUGH_PROGRAMS = 512

# With two stages the tiles stay below the 64 KiB of shared memory that the smallest target has.
TILE_CONFIGS = [
    triton.Config({}, num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (2, 1)
]


@triton.jit
def _tokens_of(tile, T, bounds, block, blocks, TILE: tl.constexpr):
    """A tile's tokens, whether they exist, and where their picks of a block begin and end."""
    t = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    real = t < T
    at = bounds + t * (blocks + 1) + block
    return t, real, tl.load(at, mask=real, other=0), tl.load(at + 1, mask=real, other=0)


@triton.jit
def _finite(rows):
    """The rows with zeros for those that hold NaN or infinity, and which those are."""
    broken = tl.max((rows - rows != 0).to(tl.int32), 1) > 0
    return tl.where(broken[:, None], 0.0, rows), broken


@triton.jit
def _products(x, rows, total, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """total + x rows^T. Products of narrow numbers are exact in float32."""
    if WIDE:
        x, rows = x.to(tl.float32), rows.to(tl.float32)
    return tl.dot(x, tl.trans(rows), total, input_precision=PRECISION)


@tuned(TILE_CONFIGS, key=["D", "TWO"])
@triton.jit
def tile_dots_kernel(
    source,  # [T, D]
    table,  # [N, R, D], `stride` from one expert to the next
    ordered,  # [T, K]: a token's experts, ascending
    picks,  # [T, K]: which pick each of them is
    bounds,  # [T, blocks + 1]: where each block's picks begin
    out,  # [1 or 2, T, K]
    pairs,
    T,
    K,
    N,
    D,
    blocks,
    stride,
    offset,  # from an expert to its row
    second_offset,
    TWO: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program multiplies a tile of tokens with a row, or two, of a block of experts."""
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    t, real, first, last = _tokens_of(tile, T, bounds, block, blocks, TILE)
    most = tl.max(last - first, 0)
    if most > 0:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = table + n.to(tl.int64) * stride
        scores = tl.zeros((TILE, BLOCK_N), tl.float32)
        second = tl.zeros((TILE, BLOCK_N), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (d < D)[None, :]
            x = tl.load(source + t[:, None] * D + d[None, :], mask=real[:, None] & inside, other=0.0)
            pieces = rows[:, None] + d[None, :]
            mask = (n < N)[:, None] & inside
            scores = _products(x, tl.load(pieces + offset, mask=mask, other=0.0), scores, WIDE, PRECISION)
            if TWO:
                other = tl.load(pieces + second_offset, mask=mask, other=0.0)
                second = _products(x, other, second, WIDE, PRECISION)
        for j in range(0, most):
            live = first + j < last
            at = t * K + first + j
            chosen = n[None, :] == tl.load(ordered + at, mask=live, other=-1)[:, None]
            place = out + t * K + tl.load(picks + at, mask=live, other=0)
            tl.store(place, tl.sum(tl.where(chosen, scores, 0.0), 1), mask=live)
            if TWO:
                tl.store(place + pairs, tl.sum(tl.where(chosen, second, 0.0), 1), mask=live)


@tuned(TILE_CONFIGS, key=["D", "TWO"])
@triton.jit
def tile_mix_kernel(
    weights,  # [T, K]
    second_weights,
    table,
    ordered,
    picks,
    bounds,
    out,  # [T, D]
    T,
    K,
    N,
    D,
    blocks,
    stride,
    offset,
    second_offset,
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program sums BLOCK_D columns of a row, or two, of all experts of a tile of tokens."""
    chunks = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) // chunks
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    total = tl.zeros((TILE, BLOCK_D), tl.float32)
    for block in range(0, blocks):
        t, _, first, last = _tokens_of(tile, T, bounds, block, blocks, TILE)
        most = tl.max(last - first, 0)
        if most > 0:
            n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            pieces = table + n.to(tl.int64)[:, None] * stride + d[None, :]
            mask = (n < N)[:, None] & inside
            rows, broken = _finite(tl.load(pieces + offset, mask=mask, other=0.0).to(tl.float32))
            spread = tl.zeros((TILE, BLOCK_N), tl.float32)
            if TWO:
                others = tl.load(pieces + second_offset, mask=mask, other=0.0).to(tl.float32)
                others, others_broken = _finite(others)
                second_spread = tl.zeros((TILE, BLOCK_N), tl.float32)
            for j in range(0, most):
                live = first + j < last
                at = t * K + first + j
                chosen = n[None, :] == tl.load(ordered + at, mask=live, other=-1)[:, None]
                pick = t * K + tl.load(picks + at, mask=live, other=0)
                weight = tl.load(weights + pick, mask=live, other=0.0)[:, None]
                weight = tl.where(broken[None, :], float("nan"), weight)
                spread += tl.where(chosen, weight, 0.0)
                if TWO:
                    weight = tl.load(second_weights + pick, mask=live, other=0.0)[:, None]
                    weight = tl.where(others_broken[None, :], float("nan"), weight)
                    second_spread += tl.where(chosen, weight, 0.0)
            total = tl.dot(spread, rows, total, input_precision=PRECISION)
            if TWO:
                total = tl.dot(second_spread, others, total, input_precision=PRECISION)
    t = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    at = out + t[:, None] * D + d[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(t < T)[:, None] & inside)


@tuned(TILE_CONFIGS, key=["D", "R"])
@triton.jit
def tile_table_kernel(
    x,
    grad_y,
    weights,  # [R, T, K]
    ordered,
    picks,
    bounds,
    parts,  # [programs along the tokens, N, R, D]
    pairs,
    T,
    K,
    N,
    D,
    blocks,
    tiles_each,  # tiles of tokens that a program sums over
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program sums BLOCK_D columns of a block of experts over some tiles of tokens."""
    chunks = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    d = program % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    block = program // chunks % blocks
    part = program // chunks // blocks
    inside = (d < D)[None, :]
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    down = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    gate = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for tile in range(part * tiles_each, tl.minimum((part + 1) * tiles_each, tl.cdiv(T, TILE))):
        t, real, first, last = _tokens_of(tile, T, bounds, block, blocks, TILE)
        most = tl.max(last - first, 0)
        if most > 0:
            mask = real[:, None] & inside
            places = t[:, None] * D + d[None, :]
            tokens, broken = _finite(tl.load(x + places, mask=mask, other=0.0).to(tl.float32))
            grads, grads_broken = _finite(tl.load(grad_y + places, mask=mask, other=0.0).to(tl.float32))
            of_down = tl.zeros((BLOCK_N, TILE), tl.float32)
            of_up = tl.zeros((BLOCK_N, TILE), tl.float32)
            of_gate = tl.zeros((BLOCK_N, TILE), tl.float32)
            for j in range(0, most):
                live = first + j < last
                at = t * K + first + j
                chosen = n[:, None] == tl.load(ordered + at, mask=live, other=-1)[None, :]
                pick = weights + t * K + tl.load(picks + at, mask=live, other=0)
                weight = tl.where(broken, float("nan"), tl.load(pick, mask=live, other=0.0))
                of_down += tl.where(chosen, weight[None, :], 0.0)
                weight = tl.load(pick + pairs, mask=live, other=0.0)
                weight = tl.where(grads_broken, float("nan"), weight)
                of_up += tl.where(chosen, weight[None, :], 0.0)
                if R == 3:
                    weight = tl.load(pick + pairs + pairs, mask=live, other=0.0)
                    weight = tl.where(broken, float("nan"), weight)
                    of_gate += tl.where(chosen, weight[None, :], 0.0)
            down = tl.dot(of_down, tokens, down, input_precision=PRECISION)
            up = tl.dot(of_up, grads, up, input_precision=PRECISION)
            if R == 3:
                gate = tl.dot(of_gate, tokens, gate, input_precision=PRECISION)
    rows = parts + ((part.to(tl.int64) * N + n) * R * D)[:, None] + d[None, :]
    mask = (n < N)[:, None] & inside
    tl.store(rows, down.to(parts.dtype.element_ty), mask=mask)
    tl.store(rows + D, up.to(parts.dtype.element_ty), mask=mask)
    if R == 3:
        tl.store(rows + D + D, gate.to(parts.dtype.element_ty), mask=mask)


def precision() -> str:
    """How float32 matrices are multiplied with float32's precision: natively where matrix units can."""
    if INTERPRETED or triton.runtime.driver.active.get_current_target().backend == "hip":
        return "ieee"
    return "tf32x3"  # NVIDIA's take 11 bits a factor: each is cut in two, for three products


class ByTiles:
    """Tiles of tokens meet blocks of experts, those that they picked and those that they did not."""

    def __init__(self, indices: Tensor, num_experts: int):
        self.shape, self.num_experts = indices.shape, num_experts
        self.blocks = triton.cdiv(num_experts, BLOCK_EXPERTS)
        # Stable, because a token may pick an expert twice, and the order of a sum must be one.
        self.ordered, picks = indices.to(torch.int32).sort(dim=1, stable=True)
        self.picks = picks.to(torch.int32)
        edges = torch.arange(self.blocks + 1, dtype=torch.int32, device=indices.device) * BLOCK_EXPERTS
        edges = edges.expand(len(indices), -1).contiguous()
        self.bounds = torch.searchsorted(self.ordered, edges, out_int32=True)
        self.sizes = dict(PRECISION=precision(), TILE=TILE_TOKENS, BLOCK_N=BLOCK_EXPERTS, BLOCK_D=BLOCK_D)

    def dots(self, source: Tensor, experts: Tensor, slots: tuple[int, ...]) -> Tensor:
        """See `ByToken.dots`."""
        (T, K), (N, _, D) = self.shape, experts.shape
        out = source.new_empty(len(slots), T, K, dtype=torch.float32)
        offsets = [slot * experts.stride(1) for slot in slots]
        tile_dots_kernel[(triton.cdiv(T, TILE_TOKENS) * self.blocks,)](
            source, experts, self.ordered, self.picks, self.bounds, out, T * K, T, K, N, D, self.blocks,
            experts.stride(0), offsets[0], offsets[-1], TWO=len(slots) == 2,
            WIDE=source.dtype != experts.dtype or source.dtype == torch.float32, **self.sizes,
        )  # fmt: skip
        return out

    def mix(
        self, weights: tuple[Tensor, ...], experts: Tensor, slots: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """See `ByToken.mix`."""
        (T, K), (N, _, D) = self.shape, experts.shape
        out = experts.new_empty(T, D, dtype=dtype)
        offsets = [slot * experts.stride(1) for slot in slots]
        tile_mix_kernel[(triton.cdiv(T, TILE_TOKENS) * triton.cdiv(D, BLOCK_D),)](
            weights[0], weights[-1], experts, self.ordered, self.picks, self.bounds, out, T, K, N, D,
            self.blocks, experts.stride(0), offsets[0], offsets[-1], TWO=len(slots) == 2, **self.sizes,
        )  # fmt: skip
        return out

    def table_gradient(self, x: Tensor, grad_y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """See `ByToken.table_gradient`."""
        (T, K), (R, N, D) = self.shape, (len(weights), self.num_experts, x.shape[1])
        programs, tiles = self.blocks * triton.cdiv(D, BLOCK_D), triton.cdiv(T, TILE_TOKENS)
        tiles_each = triton.cdiv(tiles, max(1, ENOUGH_PROGRAMS // programs))
        count = triton.cdiv(tiles, tiles_each)
        parts = weights.new_empty(count, N, R, D, dtype=dtype if count == 1 else torch.float32)
        tile_table_kernel[(count * programs,)](
            x, grad_y, weights, self.ordered, self.picks, self.bounds, parts, T * K, T, K, N, D, self.blocks,
            tiles_each, R=R, **self.sizes,
        )  # fmt: skip
        return parts[0] if count == 1 else parts.sum(0).to(dtype)
