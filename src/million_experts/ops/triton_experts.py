"""The experts by Triton kernels; shapes as in `reference`, P = T*K pairs of a token and an expert.

As there, everything reduces to three things that a table of rows can do: `dots` (a token with chosen rows),
`mix` (a weighted sum of chosen rows), and a weighted sum of tokens for each row, the table's gradient. They
come in two forms: `ByToken` for few tokens an expert, `ByTiles` for many. What lies between them, a few
numbers a pair, is here. `docs/kernels.md` explains how they work.

Sums are in float32. float64, which is there for `gradcheck`, and empty inputs go to the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from million_experts.ops import reference
from million_experts.ops.reference import Visit
from million_experts.ops.triton_expert_rows import ByToken, RowSums, sort_pairs
from million_experts.ops.triton_expert_tiles import TILE_TOKENS, ByTiles
from million_experts.ops.triton_launch import device_of

# Pairs are counted in 31 bits, offsets in 64.
MOST_PAIRS = 2**31

# From so many tokens of a tile for an expert on, tokens meet experts in tiles.
TILE_REUSE = 4.0

# Gradients that are used up as they come: about so many bytes at a time.
VISIT_BYTES = 64 * 2**20

# A few numbers a pair in, a few out: nothing to choose.
PAIR_BLOCK = 1024


def schedule(tokens: int, experts_per_token: int, num_experts: int) -> type[ByToken] | type[ByTiles]:
    """Token by token, or tiles of tokens against tiles of experts where they share enough of them.

    A tile of tokens reads every row of the pool once, and multiplies each with all its tokens, for tensor
    cores do that almost for nothing; token by token only what was picked is read, once for each pick. So the
    reuse that counts is that of a tile: how many of its tokens picked an expert. Below 1 tiles would read
    more; where exactly they win is an estimate that no GPU has confirmed (`docs/decisions.md`).
    """
    reuse = min(tokens, TILE_TOKENS) * experts_per_token / max(1, num_experts)
    return ByTiles if reuse >= TILE_REUSE else ByToken


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation and its slope. What is not a number stays so: comparisons with NaN are false."""
    if ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * below, below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "relu":  # noqa: RET505 (only one branch is compiled)
        return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
    else:
        sigmoid = 1 / (1 + tl.exp(-z))
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def output_weights_kernel(
    pre,  # [R - 1, T, K]
    gates,  # [T, K]
    weights,  # [T, K]
    pairs,
    GLU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each expert's up row is multiplied with."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = p < pairs
    hidden, _ = activate(tl.load(pre + p, mask=mask, other=0.0), ACTIVATION)
    if GLU:
        hidden *= tl.load(pre + pairs + p, mask=mask, other=0.0)
    tl.store(weights + p, hidden * tl.load(gates + p, mask=mask, other=0.0).to(tl.float32), mask=mask)


@triton.jit
def gradient_weights_kernel(
    upward,  # [T, K]: the output's gradient times the up row
    pre,  # [R - 1, T, K]
    gates,  # [T, K]
    grad_gates,  # [T, K]
    weights,  # [R, T, K]: what each row learns from its source with
    pairs,
    GLU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEEDS_GATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the gates and of the pre-activations, and the weights of the up rows."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = p < pairs
    activated, slope = activate(tl.load(pre + p, mask=mask, other=0.0), ACTIVATION)
    gate = tl.load(gates + p, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(upward + p, mask=mask, other=0.0)
    hidden = activated
    grad = up * gate
    if GLU:
        linear = tl.load(pre + pairs + p, mask=mask, other=0.0)
        hidden *= linear
        tl.store(weights + pairs + pairs + p, grad * activated, mask=mask)
        grad *= linear
    tl.store(weights + p, grad * slope, mask=mask)
    tl.store(weights + pairs + p, gate * hidden, mask=mask)
    if NEEDS_GATES:
        tl.store(grad_gates + p, (up * hidden).to(grad_gates.dtype.element_ty), mask=mask)


def _left_to_reference(x: Tensor, indices: Tensor, experts: Tensor, dtype: torch.dtype) -> bool:
    if indices.numel() >= MOST_PAIRS:
        raise ValueError(f"indices must hold fewer than 2**31 picks, got {list(indices.shape)}")
    return dtype == torch.float64 or not (x.numel() and indices.numel() and experts.numel())


def _rows_together(experts: Tensor) -> Tensor:
    """Rows and experts may lie at any distance, the columns of a row side by side."""
    return experts if experts.stride(2) == 1 else experts.contiguous()


def _walk(indices: Tensor, experts: Tensor) -> ByToken | ByTiles:
    (T, K), N = indices.shape, len(experts)
    return schedule(T, K, N)(indices, N)


def _input_slots(experts: Tensor) -> tuple[int, ...]:
    """The rows that read the token: down, and gate with GLU."""
    return (0,) if experts.shape[1] == 2 else (0, 2)


def expert_mlp(
    x: Tensor, indices: Tensor, gates: Tensor, experts: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """See `million_experts.ops.expert_mlp`; also returns the pre-activations [R - 1, T, K] for backward."""
    if _left_to_reference(x, indices, experts, reference.accumulation_dtype(x, gates, experts)):
        return reference.expert_mlp(x, indices, gates, experts, activation)
    x, indices, gates, experts = (
        x.contiguous(),
        indices.contiguous(),
        gates.contiguous(),
        _rows_together(experts),
    )
    pairs = indices.numel()
    with device_of(x):
        walk = _walk(indices, experts)
        pre = walk.dots(x, experts, _input_slots(experts))
        weights = torch.empty_like(pre[0])
        output_weights_kernel[(triton.cdiv(pairs, PAIR_BLOCK),)](
            pre, gates, weights, pairs, GLU=len(pre) == 2, ACTIVATION=activation, BLOCK=PAIR_BLOCK
        )
        y = walk.mix((weights,), experts, (1,), x.dtype)
    return y, pre


def _towards_tokens(
    walk: ByToken | ByTiles,
    grad_y: Tensor,
    gates: Tensor,
    experts: Tensor,
    pre: Tensor,
    activation: str,
    x_dtype: torch.dtype,
    needs_x: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens and gates, and the weights [R, T, K] that the table's gradient sums tokens with."""
    upward = walk.dots(grad_y, experts, (1,))
    grad_gates = torch.empty_like(gates) if needs_gates else gates.new_empty(0)
    weights = upward.new_empty(experts.shape[1], *gates.shape)
    pairs = gates.numel()
    gradient_weights_kernel[(triton.cdiv(pairs, PAIR_BLOCK),)](
        upward, pre, gates, grad_gates, weights, pairs,
        GLU=len(pre) == 2, ACTIVATION=activation, NEEDS_GATES=needs_gates, BLOCK=PAIR_BLOCK,
    )  # fmt: skip
    slots = _input_slots(experts)
    if needs_x:
        grad_x = walk.mix(tuple(weights[slot] for slot in slots), experts, slots, x_dtype)
    else:
        grad_x = grad_y.new_empty(0, dtype=x_dtype)
    return grad_x, grad_gates, weights


def expert_mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    pre: Tensor,
    activation: str,
    needs_x: bool,
    needs_gates: bool,
    needs_experts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gates and experts; an empty tensor for each that is not needed."""
    if _left_to_reference(x, indices, experts, pre.dtype):
        return reference.expert_mlp_backward(
            grad_y, x, indices, gates, experts, pre, activation, needs_x, needs_gates, needs_experts
        )
    grad_y, x, indices, gates, pre = (t.contiguous() for t in (grad_y, x, indices, gates, pre))
    experts = _rows_together(experts)
    with device_of(x):
        walk = _walk(indices, experts)
        grad_x, grad_gates, weights = _towards_tokens(
            walk, grad_y, gates, experts, pre, activation, x.dtype, needs_x, needs_gates
        )
        if needs_experts:
            grad_experts = walk.table_gradient(x, grad_y, weights, experts.dtype)
        else:
            grad_experts = experts.new_empty(0)
    return grad_x, grad_gates, grad_experts


def expert_mlp_backward_touched(
    grad_y: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    pre: Tensor,
    activation: str,
    needs_x: bool,
    needs_gates: bool,
    visit: Visit | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.expert_mlp_backward_touched`."""
    if _left_to_reference(x, indices, experts, pre.dtype):
        return reference.expert_mlp_backward_touched(
            grad_y, x, indices, gates, experts, pre, activation, needs_x, needs_gates, visit
        )
    grad_y, x, indices, gates, pre = (t.contiguous() for t in (grad_y, x, indices, gates, pre))
    experts = _rows_together(experts)
    with device_of(x):
        walk = _walk(indices, experts)
        grad_x, grad_gates, weights = _towards_tokens(
            walk, grad_y, gates, experts, pre, activation, x.dtype, needs_x, needs_gates
        )
        if isinstance(walk, ByTiles):  # a small pool, most of which is touched
            rows = indices.unique()
            values = walk.table_gradient(x, grad_y, weights, experts.dtype)[rows]
            if visit is not None:
                visit(rows, values)
        else:
            chosen, order = sort_pairs(indices, len(experts))
            rows, counts = chosen.unique_consecutive(return_counts=True)
            rows, starts = rows.long(), torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
            torch.cumsum(counts, 0, out=starts[1:])
            sums = RowSums(x, grad_y, weights, order, starts)
            if visit is None:
                values = sums.values(0, len(rows), experts.dtype)
            else:
                size = max(1, VISIT_BYTES // (experts[0].numel() * experts.element_size()))
                for first in range(0, len(rows), size):
                    some = rows[first : first + size]
                    visit(some, sums.values(first, len(some), experts.dtype))
                values = experts.new_empty(0, *experts.shape[1:])
    if visit is not None:
        rows, values = rows[:0], values[:0]
    return grad_x, grad_gates, rows, values
