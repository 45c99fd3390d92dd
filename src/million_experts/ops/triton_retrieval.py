"""Product-key retrieval by Triton kernels: the k best of n1 * n2 sums, and the gradient of their scores.

Shapes as in `reference`. Forward is one kernel: no [T, H, n] scores, nothing between the sub-keys' scores
and the winners goes through memory. A score and a position travel together as one 64-bit number whose order
is the contract's: larger score first, NaN above all, and of equal scores the lowest position.
`docs/kernels.md` has the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from million_experts.ops import reference
from million_experts.ops.reference import accumulation_dtype
from million_experts.ops.triton_launch import device_of, registers, tuned

# What the kernels do not take goes to the reference: more winners a head than stay in registers, more experts
# than 32 bits count, and float64, which is there for `gradcheck`.
MOST_K = 64
MOST_EXPERTS = 2**31

# Queries of a program: what tensor cores take at least. With 32 masks of AMD's compiler spill.
BLOCK_Q = 16

# Selections of one sub-key that a program sums. Fixed, because the order of summation follows from it.
PART = 512

# Other blocks of backward: columns of a program, queries of one of `query_grad_kernel`, and selections
# that one of `key_parts_kernel` takes at a time, on which the order of summation depends as well.
GRAD_COLUMNS = 64
GRAD_QUERIES = 8
GRAD_SELECTIONS = 16

# Columns of a query half that is kept while it meets the sub-keys; a deeper one comes in slices.
MOST_WHOLE = 128
SLICE = 32

# Warps and stages alone, so that no sum of ours moves. Whether the bits of a product of matrices do, only a
# GPU can tell (`tests/gpu`).
TOPK_CONFIGS = [
    triton.Config({}, num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (2, 3)
]


def _usable(configs, named_arguments, **constants):
    """Those that fit the registers and the shared memory of every target.

    Many winners need the registers of eight warps; with few, eight warps have no room for slices of the
    depth, nor, on sm_100, for float32. Neither many winners nor float32 at its whole depth leave any for a
    third stage.
    """
    many, whole, wide = constants["K_PADDED"] > 32, constants["WHOLE"], constants["WIDE"]
    if many:
        configs = [c for c in configs if c.num_warps == 8]
    elif wide or not whole:
        configs = [c for c in configs if c.num_warps == 4]
    return [c for c in configs if c.num_stages == 2] if many or (whole and wide) else configs


@triton.jit
def _nothing(rows: tl.constexpr, columns: tl.constexpr):
    """What is below every packed score, minus infinity too."""
    return tl.full((rows, columns), -0x8000000000000000, tl.int64)


@triton.jit
def _pack(scores, positions):
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores == 0, 0, bits)  # minus zero equals zero
    bits = tl.where(scores != scores, 0x7FC00000, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - positions.to(tl.int64))


@triton.jit
def _score(packed):
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _position(packed):
    return 0xFFFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def _merge(best, candidates, K_PADDED: tl.constexpr):
    """The largest K_PADDED of both, in no order that matters: one list ascends, the other descends."""
    return tl.maximum(tl.bitonic_merge(best), tl.topk(candidates, K_PADDED, dim=1))


@triton.jit
def _widen(x, WIDE: tl.constexpr):
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _best_sub_keys(
    query,  # [BLOCK_Q] pointers to the rows of one half
    real,  # [BLOCK_Q]
    keys,
    n,
    d,
    WIDE: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # a query half fits in BLOCK_D, and is read once
):
    """[BLOCK_Q, K_PADDED] packed scores and positions, descending."""
    depth = tl.arange(0, BLOCK_D)
    best = _nothing(BLOCK_Q, K_PADDED)
    if WHOLE:
        whole = tl.load(query[:, None] + depth[None, :], mask=real[:, None] & (depth < d)[None, :], other=0.0)
        whole = _widen(whole, WIDE)
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        rows = keys + position.to(tl.int64) * d
        scores = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        if WHOLE:
            mask = (position < n)[:, None] & (depth < d)[None, :]
            codes = tl.load(rows[:, None] + depth[None, :], mask=mask, other=0.0)
            scores = tl.dot(whole, tl.trans(_widen(codes, WIDE)), scores, input_precision="ieee")
        else:
            for at in range(0, d, BLOCK_D):
                columns = at + depth
                inside = (columns < d)[None, :]
                part = tl.load(query[:, None] + columns[None, :], mask=real[:, None] & inside, other=0.0)
                mask = (position < n)[:, None] & inside
                codes = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0)
                scores = tl.dot(
                    _widen(part, WIDE), tl.trans(_widen(codes, WIDE)), scores, input_precision="ieee"
                )
        packed = tl.where(
            (position < n)[None, :], _pack(scores, position[None, :]), _nothing(BLOCK_Q, BLOCK_N)
        )
        best = _merge(best, packed, K_PADDED)
    return tl.bitonic_merge(best, descending=True)


@triton.jit
def _sums(first, second, a, b, allowed, n2, BLOCK_Q: tl.constexpr, K_PADDED: tl.constexpr):
    """Packed sums [BLOCK_Q, K_PADDED] of the pairs of ranks (a, b), where they are allowed."""
    a = tl.broadcast_to(tl.minimum(a, K_PADDED - 1)[None, :], (BLOCK_Q, K_PADDED))
    b = tl.broadcast_to(tl.minimum(b, K_PADDED - 1)[None, :], (BLOCK_Q, K_PADDED))
    first, second = tl.gather(first, a, 1), tl.gather(second, b, 1)
    packed = _pack(_score(first) + _score(second), _position(first) * n2 + _position(second))
    return tl.where(allowed[None, :], packed, _nothing(BLOCK_Q, K_PADDED))


@triton.jit
def _best_pairs(
    first, second, real, n2, k, K_PADDED: tl.constexpr, LOG_K: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """[BLOCK_Q, K_PADDED] packed sums and experts, descending.

    The pair (a, b) of ranks has (a + 1) * (b + 1) pairs at least as good, itself included, so that where
    this is more than k it need not be looked at. Those left are looked at in LOG_K + 1 rounds of K_PADDED: in
    round r the first rank goes from 2**r - 1 to 2 * (2**r - 1), and the second to K_PADDED / 2**r.

    A pair left out may still round to the sum of the k-th best and have a lower position, and sums that are
    not finite follow no order. The first pair left out of each rank tells. It is rare; then all pairs are
    looked at in k rounds. One loop does both, for sorting is much code.
    """
    place = tl.arange(0, K_PADDED)
    best = _nothing(BLOCK_Q, K_PADDED)
    doubt = tl.program_id(0) * 0 + 1
    for full in range(2):
        if doubt > 0:
            best = _nothing(BLOCK_Q, K_PADDED)
            for r in range(LOG_K + 1 + full * (k - LOG_K - 1)):
                level = tl.minimum(r, LOG_K)
                a = full * r + (1 - full) * ((1 << level) - 1 + (place >> (LOG_K - level)))
                b = full * place + (1 - full) * (place & ((K_PADDED >> level) - 1))
                allowed = (b < k) & ((a + 1) * (b + 1) <= k + full * k * k)
                best = _merge(best, _sums(first, second, a, b, allowed, n2, BLOCK_Q, K_PADDED), K_PADDED)
            best = tl.bitonic_merge(best, descending=True)
            last = tl.sum(tl.where((place == k - 1)[None, :], best >> 32, 0), 1)
            left_out = k // (place + 1)
            real_pair = (place < k) & (left_out < k)
            close = _sums(first, second, place, left_out, real_pair, n2, BLOCK_Q, K_PADDED)
            endless = (tl.abs(_score(first)) < float("inf")) & (tl.abs(_score(second)) < float("inf")) == 0
            unsure = real_pair[None, :] & ((close >> 32) >= last[:, None]) | (place < k)[None, :] & endless
            doubt = tl.max(tl.max((unsure & real[:, None]).to(tl.int32), 1), 0)
    return best


@tuned(TOPK_CONFIGS, key=["n1", "n2", "d", "K_PADDED"], usable=_usable)
@triton.jit
def topk_kernel(
    query,
    keys1,
    keys2,
    scores,
    indices,
    rows,  # queries of a codebook
    heads,
    stride_t,
    stride_h,
    stride_half,
    n1,
    n2,
    d,
    k,
    PER_HEAD: tl.constexpr,
    WIDE: tl.constexpr,
    K_PADDED: tl.constexpr,
    LOG_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    codebook = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = row < rows
    if PER_HEAD:
        row = row * heads + codebook
        keys1 += codebook * n1 * d
        keys2 += codebook * n2 * d
    query += row // heads * stride_t + row % heads * stride_h
    first = _nothing(BLOCK_Q, K_PADDED)
    second = _nothing(BLOCK_Q, K_PADDED)
    for half in range(2):  # a loop, for sorting is much code
        keys = keys1
        if half == 1:
            keys = keys2
        n = n1 + half * (n2 - n1)
        source = query + half * stride_half
        first = second
        second = _best_sub_keys(source, real, keys, n, d, WIDE, K_PADDED, BLOCK_Q, BLOCK_N, BLOCK_D, WHOLE)
    best = _best_pairs(first, second, real, n2, k, K_PADDED, LOG_K, BLOCK_Q)
    place = tl.arange(0, K_PADDED)
    at = row[:, None] * k + place[None, :]
    mask = real[:, None] & (place < k)[None, :]
    tl.store(scores + at, _score(best), mask=mask)
    tl.store(indices + at, _position(best), mask=mask)


def _taken(k: int, query: Tensor, keys1: Tensor, keys2: Tensor, *others: Tensor) -> bool:
    narrow = accumulation_dtype(query, keys1, keys2, *others) == torch.float32
    return narrow and k <= MOST_K and keys1.shape[-2] * keys2.shape[-2] < MOST_EXPERTS


def _rows_together(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _columns(d: int, most: int) -> int:
    """A power of two for tiles of d columns, at least the 16 that tensor cores take."""
    return min(most, max(16, triton.next_power_of_2(d)))


def padded(k: int) -> int:
    """K_PADDED of `topk_kernel`: the numbers that it sorts are a power of two."""
    return max(2, triton.next_power_of_2(k))


def most_parts(selections: int, sub_keys: int) -> int:
    """Parts that there can be of the selections: how many there are is known on the device alone."""
    return selections // PART + min(sub_keys, selections)


def blocks(d: int, k_padded: int, wide: bool) -> tuple[bool, int, int]:
    """WHOLE, BLOCK_N and BLOCK_D of `topk_kernel`.

    A deeper codebook comes in thin slices: wide ones, and masks of a depth that is no multiple of 16, do not
    fit in registers beside the best k.
    """
    whole = d <= (SLICE if (wide or d % 16) and k_padded > 32 else MOST_WHOLE)
    return whole, max(64 if whole else 32, k_padded), _columns(d, MOST_WHOLE) if whole else SLICE


def product_key_topk(query: Tensor, keys1: Tensor, keys2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `million_experts.ops.product_key_topk`."""
    if not _taken(k, query, keys1, keys2):
        return reference.product_key_topk(query, keys1, keys2, k)
    T, H, _, d = query.shape
    query, keys1, keys2 = _rows_together(query), keys1.contiguous(), keys2.contiguous()
    if keys1.dtype != keys2.dtype:
        keys1, keys2 = keys1.float(), keys2.float()
    scores = query.new_empty(T, H, k, dtype=torch.float32)
    indices = query.new_empty(T, H, k, dtype=torch.int64)
    if T * H == 0:
        return scores, indices
    codebooks = 1 if keys1.dim() == 2 else H
    rows = T * H // codebooks
    k_padded = padded(k)
    if k_padded > 32 and query.dtype != keys1.dtype:  # to widen on the way takes a register too many on AMD
        query, keys1, keys2 = query.float(), keys1.float(), keys2.float()
    wide = query.dtype != keys1.dtype or query.dtype == torch.float32
    whole, block_n, block_d = blocks(d, k_padded, wide)
    with device_of(query):
        topk_kernel[triton.cdiv(rows, BLOCK_Q), codebooks](
            query, keys1, keys2, scores, indices, rows, H, *query.stride()[:3], keys1.shape[-2],
            keys2.shape[-2], d, k,
            PER_HEAD=codebooks != 1 or keys1.dim() == 3,
            WIDE=wide,
            K_PADDED=k_padded, LOG_K=k_padded.bit_length() - 1,
            BLOCK_Q=BLOCK_Q, BLOCK_N=block_n, BLOCK_D=block_d, WHOLE=whole,
            **registers(),
        )  # fmt: skip
    return scores, indices


# --- backward ----------------------------------------------------------------------------------------------


@triton.jit
def query_grad_kernel(
    grad_scores,
    indices,
    keys1,
    keys2,
    grad_query,
    rows,
    heads,
    n1,
    n2,
    d,
    k,
    PER_HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_query[row, half] = sum over the row's winners of their gradient times their sub-key, in order."""
    chunks = tl.cdiv(d, BLOCK_D)
    row = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = row < rows
    column = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = real[:, None] & (column < d)[None, :]
    codebook = row % heads if PER_HEAD else row * 0
    first = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    second = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for c in range(k):
        grad = tl.load(grad_scores + row * k + c, mask=real, other=0.0).to(tl.float32)
        index = tl.load(indices + row * k + c, mask=real, other=0).to(tl.int32)
        i = index // n2
        at1 = (codebook * n1 + i) * d
        at2 = (codebook * n2 + (index - i * n2)) * d
        code1 = tl.load(keys1 + at1[:, None] + column[None, :], mask=mask, other=0.0)
        code2 = tl.load(keys2 + at2[:, None] + column[None, :], mask=mask, other=0.0)
        first += grad[:, None] * code1.to(tl.float32)
        second += grad[:, None] * code2.to(tl.float32)
    out = grad_query + row[:, None] * (2 * d) + column[None, :]
    tl.store(out, first.to(grad_query.dtype.element_ty), mask=mask)
    tl.store(out + d, second.to(grad_query.dtype.element_ty), mask=mask)


@triton.jit
def key_parts_kernel(
    grad_scores,
    query,
    order,  # selections sorted by sub-key: (row, half, winner) as one number
    starts,  # [sub-keys + 1], where each sub-key's selections begin in `order`
    part_starts,  # [sub-keys + 1], where each sub-key's parts begin
    owners,  # [parts], the sub-key of a part; `sub_keys` for parts that are not used
    parts,
    sub_keys,
    heads,
    stride_t,
    stride_h,
    stride_half,
    d,
    k,
    PART: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """parts[p] = sum over up to PART selections of one sub-key of their gradient times their query."""
    chunks = tl.cdiv(d, BLOCK_D)
    part = tl.program_id(0) // chunks
    column = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    owner = tl.load(owners + part)
    if owner < sub_keys:
        begin = tl.load(starts + owner) + (part - tl.load(part_starts + owner)) * PART
        end = tl.minimum(begin + PART, tl.load(starts + owner + 1))
        total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
        for start in range(begin, end, BLOCK_P):
            at = start + tl.arange(0, BLOCK_P)
            real = at < end
            selection = tl.load(order + at, mask=real, other=0)
            half_row = selection // k
            row = half_row // 2
            source = row // heads * stride_t + row % heads * stride_h + half_row % 2 * stride_half
            grad = tl.load(grad_scores + row * k + selection % k, mask=real, other=0.0).to(tl.float32)
            mask = real[:, None] & (column < d)[None, :]
            total += grad[:, None] * tl.load(
                query + source[:, None] + column[None, :], mask=mask, other=0.0
            ).to(tl.float32)
        at = part.to(tl.int64) * d + column
        tl.store(parts + at, tl.sum(total, 0), mask=column < d)


@triton.jit
def key_sum_kernel(parts, part_starts, grad_keys1, grad_keys2, n1, n2, d, BLOCK_D: tl.constexpr):
    """The sum of a sub-key's parts, in order; zeros for a sub-key that has none."""
    chunks = tl.cdiv(d, BLOCK_D)
    sub_key = (tl.program_id(0) // chunks).to(tl.int64)
    column = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(tl.load(part_starts + sub_key), tl.load(part_starts + sub_key + 1)):
        total += tl.load(parts + part * d + column, mask=column < d, other=0.0)
    codebook, position = sub_key // (n1 + n2), sub_key % (n1 + n2)
    at1 = (codebook * n1 + position) * d + column
    at2 = (codebook * n2 + position - n1) * d + column
    tl.store(grad_keys1 + at1, total.to(grad_keys1.dtype.element_ty), mask=(column < d) & (position < n1))
    tl.store(grad_keys2 + at2, total.to(grad_keys2.dtype.element_ty), mask=(column < d) & (position >= n1))


def product_key_topk_backward(
    grad_scores: Tensor, indices: Tensor, query: Tensor, keys1: Tensor, keys2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys1 and keys2; only the selected sub-keys get any."""
    T, H, k = indices.shape
    if not _taken(k, query, keys1, keys2, grad_scores):
        return reference.product_key_topk_backward(grad_scores, indices, query, keys1, keys2)
    d, n1, n2 = query.shape[-1], keys1.shape[-2], keys2.shape[-2]
    query, keys1, keys2 = _rows_together(query), keys1.contiguous(), keys2.contiguous()
    grad_scores, indices = grad_scores.contiguous(), indices.contiguous()
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_keys1, grad_keys2 = torch.empty_like(keys1), torch.empty_like(keys2)
    if T * H == 0 or d == 0:
        return grad_query, grad_keys1.zero_(), grad_keys2.zero_()
    per_head = keys1.dim() == 3
    block_d = _columns(d, GRAD_COLUMNS)
    chunks = triton.cdiv(d, block_d)
    with device_of(query):
        query_grad_kernel[(triton.cdiv(T * H, GRAD_QUERIES) * chunks,)](
            grad_scores, indices, keys1, keys2, grad_query, T * H, H, n1, n2, d, k,
            PER_HEAD=per_head, BLOCK_Q=GRAD_QUERIES, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
        order, starts = _sort_selections(indices, n1, n2, H if per_head else 1)
        sub_keys = len(starts) - 1
        part_starts = torch.zeros_like(starts)
        torch.cumsum((starts.diff() + (PART - 1)) // PART, 0, out=part_starts[1:])
        most = most_parts(len(order), sub_keys)
        owners = torch.searchsorted(part_starts, torch.arange(most, device=query.device), right=True) - 1
        parts = query.new_empty(most, d, dtype=torch.float32)
        key_parts_kernel[(most * chunks,)](
            grad_scores, query, order, starts, part_starts, owners, parts, sub_keys, H,
            *query.stride()[:3], d, k,
            PART=PART, BLOCK_P=GRAD_SELECTIONS, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
        key_sum_kernel[(sub_keys * chunks,)](
            parts, part_starts, grad_keys1, grad_keys2, n1, n2, d, BLOCK_D=block_d, num_warps=1
        )
    return grad_query, grad_keys1, grad_keys2


def _sort_selections(indices: Tensor, n1: int, n2: int, codebooks: int) -> tuple[Tensor, Tensor]:
    """Selections ordered by sub-key, and where each sub-key's begin.

    A selection is the position of a sub-key in [T, H, 2, k]; sub-keys are counted codebook by codebook, in
    each the n1 of the first half before the n2 of the second. The sort is stable: the order is one.
    """
    narrow = indices.to(torch.int32)
    first = torch.div(narrow, n2, rounding_mode="floor")
    picks = torch.stack([first, narrow - first * n2 + n1], 2)
    if codebooks > 1:
        picks += (torch.arange(codebooks, dtype=torch.int32, device=picks.device) * (n1 + n2)).view(-1, 1, 1)
    picks, order = picks.flatten().sort(stable=True)
    bounds = torch.arange(codebooks * (n1 + n2) + 1, dtype=torch.int32, device=picks.device)
    return order, torch.searchsorted(picks, bounds)
