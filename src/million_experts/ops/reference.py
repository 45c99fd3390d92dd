"""The operations in plain PyTorch: what every other backend is compared with.

Shapes: T tokens, D model width, H heads, k experts a head, K = H*k experts a token, N = n1*n2 experts,
R rows an expert (2, or 3 with GLU), d width of a sub-key, M rows of any table.

Everything reduces to three things that a table of rows can do: `dots` (a token with chosen rows), `mix`
(a weighted sum of chosen rows) and `accumulate` (a weighted sum of tokens for each row). None of them makes
a tensor [T, K, D].
"""

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from million_experts.ops.reference_rowwise import rowwise_adamw as rowwise_adamw

# What takes rows [n] of a table and their gradients [n, R, D].
Visit = Callable[[Tensor, Tensor], None]

# Upper bound on the scratch memory that does not grow with the inputs or outputs.
SCRATCH_BYTES = 64 * 2**20

ACTIVATIONS = ("gelu", "relu", "silu")

# The first sparse tensor of a process warns that their support is in beta. `dots` uses one only to name
# positions: let it be this one, unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int64), [], [], (0, 1), check_invariants=False)


def activate(name: str, z: Tensor) -> Tensor:
    """`name` applied to z; GELU is the exact one, with the error function."""
    if name == "gelu":
        return F.gelu(z)
    return F.relu(z) if name == "relu" else F.silu(z)


def activate_backward(name: str, grad: Tensor, z: Tensor) -> Tensor:
    """`grad` times the derivative of `name` at z."""
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, z)
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    return torch.ops.aten.silu_backward(grad, z)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if anything is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _chunks(length: int, bytes_each: int) -> Iterator[slice]:
    """Slices of a range of `length` things such that each slice needs at most SCRATCH_BYTES."""
    step = max(1, SCRATCH_BYTES // max(1, bytes_each))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def dots(x_TD: Tensor, table_MD: Tensor, rows_TK: Tensor) -> Tensor:
    """[T, K] in x's dtype: x[t] . table[rows[t, k]]."""
    T, K = rows_TK.shape
    if rows_TK.numel() == 0 or x_TD.shape[1] == 0:
        return x_TD.new_zeros(T, K)
    # sampled_addmm takes repeated columns, but no more entries in a row than there are columns.
    fits = len(table_MD) >= K and table_MD.dtype == x_TD.dtype and table_MD.is_contiguous()
    if x_TD.device.type == "cpu" and fits:
        # Row by row without a gathered copy: 23 ms against 73 ms for gather and einsum
        # at 2048 x 128 rows of 256 floats out of 131,072.
        crow = torch.arange(0, T * K + 1, K)
        at = torch.sparse_csr_tensor(
            crow, rows_TK.flatten(), x_TD.new_zeros(T * K), (T, len(table_MD)), check_invariants=False
        )
        # A copy, because the values are a view that would keep the sparse tensor alive until backward.
        return torch.sparse.sampled_addmm(at, x_TD, table_MD.t(), beta=0.0).values().clone().view(T, K)
    out = x_TD.new_empty(T, K)
    for s in _chunks(T, K * x_TD.shape[1] * x_TD.element_size() * 2):
        out[s] = torch.einsum("tkd,td->tk", table_MD[rows_TK[s]].to(x_TD.dtype), x_TD[s])
    return out


def mix(weights_TK: Tensor, table_MD: Tensor, rows_TK: Tensor) -> Tensor:
    """[T, D] in the dtype of the weights: sum over k of weights[t, k] * table[rows[t, k]]."""
    T, K = rows_TK.shape
    if rows_TK.numel() == 0 or table_MD.shape[1] == 0:
        return weights_TK.new_zeros(T, table_MD.shape[1])
    if table_MD.dtype == weights_TK.dtype:
        return F.embedding_bag(rows_TK, table_MD, per_sample_weights=weights_TK, mode="sum")
    out = weights_TK.new_empty(T, table_MD.shape[1])
    for s in _chunks(T, K * table_MD.shape[1] * weights_TK.element_size() * 2):
        out[s] = torch.einsum("tkd,tk->td", table_MD[rows_TK[s]].to(weights_TK.dtype), weights_TK[s])
    return out


def accumulate(
    weights_P: Tensor, x_TD: Tensor, tokens_P: Tensor, rows_P: Tensor, M: int, dtype: torch.dtype
) -> Tensor:
    """[M, D] in `dtype`: row m is the sum over pairs p with rows[p] = m of weights[p] * x[tokens[p]].

    Deterministic: the pairs are sorted stably by row, and each row is summed in that order in x's dtype.
    """
    rows_P, order_P = torch.sort(rows_P, stable=True)
    weights_P, tokens_P = weights_P[order_P], tokens_P[order_P]
    offsets = torch.searchsorted(rows_P, torch.arange(M + 1, device=rows_P.device))
    if dtype == x_TD.dtype:
        return _segment_sums(weights_P, x_TD, tokens_P, offsets)
    out = x_TD.new_empty(M, x_TD.shape[1], dtype=dtype)
    for s in _chunks(M, x_TD.shape[1] * x_TD.element_size()):
        first, last = int(offsets[s.start]), int(offsets[s.stop])
        pairs = slice(first, last)
        out[s] = _segment_sums(weights_P[pairs], x_TD, tokens_P[pairs], offsets[s.start : s.stop + 1] - first)
    return out


def _segment_sums(weights_P: Tensor, x_TD: Tensor, tokens_P: Tensor, offsets: Tensor) -> Tensor:
    if tokens_P.numel() == 0 or x_TD.shape[1] == 0:
        return x_TD.new_zeros(len(offsets) - 1, x_TD.shape[1])
    return F.embedding_bag(
        tokens_P, x_TD, offsets, per_sample_weights=weights_P, mode="sum", include_last_offset=True
    )


def product_key_topk(query: Tensor, keys1: Tensor, keys2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `million_experts.ops.product_key_topk`."""
    T, H = query.shape[:2]
    n1, n2 = keys1.shape[-2], keys2.shape[-2]
    dtype = accumulation_dtype(query, keys1, keys2)
    keys1, keys2 = keys1.to(dtype), keys2.to(dtype)
    scores = query.new_empty(T, H, k, dtype=dtype)
    indices = query.new_empty(T, H, k, dtype=torch.int64)
    for s in _chunks(T, H * (n1 + n2 + 2 * k * k) * dtype.itemsize):
        q = query[s].to(dtype)
        scores1, i = _best_sub_keys(q[:, :, 0], keys1, k)
        scores2, j = _best_sub_keys(q[:, :, 1], keys2, k)
        # Sub-keys stand in ascending order, so position in the flattened k x k sums orders like the index.
        sums = (scores1.unsqueeze(-1) + scores2.unsqueeze(-2)).flatten(-2)
        best = _largest(sums, k)
        scores[s], order = sums.gather(-1, best).sort(dim=-1, descending=True, stable=True)
        best = best.gather(-1, order)
        indices[s] = i.gather(-1, best // k) * n2 + j.gather(-1, best % k)
    return scores, indices


def _best_sub_keys(query_THd: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and positions [T, H, k] of each query's best k sub-keys, in ascending order of position."""
    codebook = "nd" if keys.dim() == 2 else "hnd"
    scores = torch.einsum(f"thd,{codebook}->thn", query_THd, keys)
    best = _largest(scores, k)
    return scores.gather(-1, best), best


def _largest(values: Tensor, k: int) -> Tensor:
    """Positions [..., k] of the k largest values in ascending order; equal values: lowest position first."""
    if k == values.shape[-1]:
        return torch.arange(k, device=values.device).expand(values.shape)
    top, positions = values.topk(k + 1, dim=-1)
    positions = positions[..., :k]
    # topk picks any of the values that are equal at the border; sort only the rows where that matters.
    tied = top[..., k - 1] == top[..., k]
    if tied.any():
        positions[tied] = values[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return positions.sort(dim=-1).values


def product_key_topk_backward(
    grad_scores: Tensor, indices: Tensor, query: Tensor, keys1: Tensor, keys2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys1 and keys2; only the selected sub-keys get any."""
    n2 = keys2.shape[-2]
    grad_query = query.new_empty(query.shape)
    grad_keys1 = _half_backward(grad_scores, indices // n2, query, keys1, 0, grad_query)
    grad_keys2 = _half_backward(grad_scores, indices % n2, query, keys2, 1, grad_query)
    return grad_query, grad_keys1, grad_keys2


def _half_backward(
    grad_scores: Tensor, picks: Tensor, query: Tensor, keys: Tensor, half: int, grad_query: Tensor
) -> Tensor:
    T, H, k = picks.shape
    dtype = accumulation_dtype(grad_scores, query, keys)
    if keys.dim() == 3:  # one codebook a head: rows of the H codebooks laid end to end
        picks = picks + torch.arange(H, device=picks.device).view(H, 1) * keys.shape[1]
    table = keys.reshape(-1, keys.shape[-1])
    rows, grad = picks.reshape(T * H, k), grad_scores.reshape(T * H, k).to(dtype)
    grad_query[:, :, half] = mix(grad, table.to(dtype), rows).view(T, H, keys.shape[-1])
    queries = query[:, :, half].reshape(T * H, keys.shape[-1]).to(dtype)
    owners = torch.arange(T * H, device=rows.device).unsqueeze(1).expand(T * H, k)
    grads = accumulate(grad.flatten(), queries, owners.flatten(), rows.flatten(), len(table), keys.dtype)
    return grads.view_as(keys)


def expert_mlp(
    x: Tensor, indices: Tensor, gates: Tensor, experts: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """See `million_experts.ops.expert_mlp`; also returns the pre-activations [R - 1, T, K] for backward."""
    N, R, D = experts.shape
    dtype = accumulation_dtype(x, gates, experts)
    table = experts.reshape(N * R, D)
    inputs = [indices * R + r for r in range(R) if r != 1]  # row 1 is the one that projects up
    pre = dots(x.to(dtype), table, torch.cat(inputs, 1))
    pre = pre.view(len(x), R - 1, indices.shape[1]).transpose(0, 1).contiguous()
    y = mix(gates.to(dtype) * _hidden(pre, activation), table, indices * R + 1)
    return y.to(x.dtype), pre


def _hidden(pre: Tensor, activation: str) -> Tensor:
    """[T, K]: what each expert multiplies its up row with, before the gate."""
    hidden = activate(activation, pre[0])
    return hidden * pre[1] if len(pre) == 2 else hidden


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
    N, R, D = experts.shape
    T, K = indices.shape
    dtype = pre.dtype
    table = experts.reshape(N * R, D)
    grad_y, wide_gates = grad_y.to(dtype), gates.to(dtype)
    grad_x, grad_gates, grad_experts = (t.new_empty(0) for t in (x, gates, experts))

    hidden = _hidden(pre, activation)
    upward = dots(grad_y, table, indices * R + 1)
    grad_hidden = upward * wide_gates
    if R == 3:
        grad_pre = [
            activate_backward(activation, grad_hidden * pre[1], pre[0]),
            grad_hidden * activate(activation, pre[0]),
        ]
    else:
        grad_pre = [activate_backward(activation, grad_hidden, pre[0])]
    inputs = [indices * R + r for r in range(R) if r != 1]
    if needs_gates:
        grad_gates = (upward * hidden).to(gates.dtype)
    if needs_x:
        grad_x = mix(torch.cat(grad_pre, 1), table, torch.cat(inputs, 1)).to(x.dtype)
    if needs_experts:
        # Rows that read x learn from x, the row that writes y learns from its gradient.
        sources = torch.cat([x.to(dtype), grad_y])
        tokens = torch.arange(T, device=x.device).unsqueeze(1).expand(T, K)
        weights_P = torch.stack([*grad_pre, wide_gates * hidden])
        tokens_P = torch.stack([*[tokens] * (R - 1), tokens + T])
        rows_P = torch.stack([*inputs, indices * R + 1])
        grad_experts = accumulate(
            weights_P.flatten(), sources, tokens_P.flatten(), rows_P.flatten(), N * R, experts.dtype
        ).view(N, R, D)
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
    """Gradients of x and gates as above, and of the experts that were touched: rows [n] and values [n, R, D].

    With `visit` the latter are handed to it, some rows at a time and in ascending order, when nothing else
    needs the experts any more, and are empty in what is returned.
    """
    rows, own = indices.unique(return_inverse=True)  # sorted
    grad_x, grad_gates, values = expert_mlp_backward(
        grad_y, x, own, gates, experts[rows], pre, activation, needs_x, needs_gates, True
    )
    if visit is not None:
        visit(rows, values)
        rows, values = rows[:0], values[:0]
    return grad_x, grad_gates, rows, values


def masked_batch_norm(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `million_experts.ops.masked_batch_norm`."""
    x, weight, bias = (t.to(accumulation_dtype(x)) for t in (x, weight, bias))
    real = x if mask is None else x[mask]
    mean = real.mean(0)
    centred = real - mean
    variance = centred.square().mean(0)
    y = centred * (torch.rsqrt(variance + eps) * weight) + bias
    y = y.contiguous() if mask is None else spread(y, mask)
    return y, mean, variance


def spread(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows at the true places of the mask, zeros elsewhere."""
    out = rows.new_zeros(len(mask), *rows.shape[1:])
    out[mask] = rows
    return out


def masked_batch_norm_backward(
    grad_y: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; none of a masked token's."""
    dtype = mean.dtype
    grad, real = grad_y.to(dtype), x.to(dtype)
    if mask is not None:
        grad, real = grad[mask], real[mask]
    rstd = torch.rsqrt(variance + eps)
    z = (real - mean) * rstd
    grad_weight, grad_bias = (grad * z).sum(0), grad.sum(0)
    grad_x = weight.to(dtype) * rstd * (grad - grad_bias / len(grad) - z * (grad_weight / len(grad)))
    grad_x = grad_x.contiguous() if mask is None else spread(grad_x, mask)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
