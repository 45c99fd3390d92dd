"""The operations by the C++ kernels in csrc/: tensors are made contiguous and handed over.

Shapes as in `reference`. The kernels run on torch's own OpenMP threads and give the same bits for any number
of them; `cpu_products`, which is torch's products for the most part, need not. `docs/kernels.md` explains how
they work.
"""

import ctypes
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from million_experts.ops import _kernels, cpu_products
from million_experts.ops.checks import check_range, check_row_state, check_shape
from million_experts.ops.reference import ACTIVATIONS, Visit, accumulation_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# From this size on a table's gradient lies in a buffer that is kept when it is freed.
KEPT_BYTES = 8 * 2**20
# From this size on a table is put on huge pages.
HUGE_BYTES = 32 * 2**20

# Experts that tokens meet together, where they share enough of them: as many as fill half the second cache.
BLOCK_BYTES = 2**20
TILE_TOKENS = 1024
BLOCK_REUSE = 4.0

# The kernels count pairs of token and expert, and experts, in 32 bits.
MOST_PAIRS = 2**32


class _LoadedObject(ctypes.Structure):
    """The beginning of C's `struct dl_phdr_info`."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def _loaded_libraries() -> set[str]:
    """Paths of the shared libraries in this process. The C library is asked, since /proc may be missing."""
    paths = set()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_LoadedObject), ctypes.c_size_t, ctypes.c_void_p)
    def keep(loaded: Any, size: int, data: int) -> int:
        paths.add(os.path.realpath(os.fsdecode(loaded.contents.name)))
        return 0

    ctypes.CDLL(None).dl_iterate_phdr(keep, None)
    return paths


def _find_openmp() -> str | None:
    """Path of the OpenMP runtime that torch brought into this process: the kernels bring no second one."""
    pattern = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.(so|dylib)[^/]*$")
    home = os.path.realpath(Path(torch.__file__).parent)
    if sys.platform == "linux":
        loaded = _loaded_libraries()
    else:
        loaded = {str(path) for path in (Path(home) / "lib").iterdir()}
    found = sorted(path for path in loaded if pattern.search(path))
    # torch/lib and torch.libs, before what other packages loaded
    return next((path for path in found if path.startswith(home)), found[0] if found else None)


def _use_openmp() -> str | None:
    path = _find_openmp()
    if path is None:
        return None
    library = ctypes.CDLL(path)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        entries = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
    except AttributeError:
        return None
    _kernels.use_openmp(*entries)
    return path


#: Path of the OpenMP runtime in use, or None: then the kernels run on one thread.
OPENMP = _use_openmp()


def instruction_sets() -> list[str]:
    """Instruction sets that the kernels were built for and this processor has, slowest first."""
    return _kernels.instruction_sets()


def instruction_set() -> str:
    """The instruction set in use; by default the last of `instruction_sets`."""
    return _kernels.instruction_set()


def use_instruction_set(name: str) -> None:
    """Makes every kernel use the named instruction set from now on.

    Raises:
        ValueError: it is not one of `instruction_sets()`.
    """
    if name not in instruction_sets():
        raise ValueError(f"name must be one of {', '.join(instruction_sets())}, got {name!r}")
    _kernels.use_instruction_set(name)


def release_buffers() -> int:
    """Frees the gradient buffers that are kept for reuse and not in use now; returns their bytes."""
    return _kernels.release_buffers()


def threads() -> int:
    return torch.get_num_threads() if OPENMP else 1


def block_experts(tokens: int, experts_per_token: int, num_experts: int, expert_bytes: int) -> int:
    """How many experts a tile of tokens meets before it goes on to the next, a power of two.

    Or all of them: then it goes token by token.

    Going block by block reads an expert from memory once for a tile of tokens instead of once for each token,
    and costs a sort of the pairs and more visits to each token. It pays once a tile has enough tokens for an
    expert; `docs/kernels.md` has the measurement.
    """
    reuse = min(tokens, TILE_TOKENS) * experts_per_token / max(1, num_experts)
    if reuse < BLOCK_REUSE or num_experts * expert_bytes <= BLOCK_BYTES:
        return num_experts
    block = 2 ** int(math.log2(max(1, BLOCK_BYTES // expert_bytes)))
    return min(num_experts, block)


def huge_pages() -> str:
    """Whether the system grants huge pages to large tables and gradients, and why not."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        return "not offered by this system"
    chosen = re.search(r"\[(\w+)\]", setting.read_text())
    mode = chosen[1] if chosen else "unknown"
    return f"not offered: {setting} is set to {mode}" if mode == "never" else f"offered ({mode})"


def advise_huge_pages(tensor: Tensor) -> bool:
    """Asks the system for huge pages under a large tensor on the CPU that nobody has written to yet."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):  # a fake tensor, say, has no memory
        return False
    if tensor.device.type != "cpu" or tensor.nbytes < HUGE_BYTES:
        return False
    return _kernels.advise_huge_pages(tensor)


_placed: set[tuple[int, int]] = set()


def _place_on_huge_pages(table: Tensor) -> None:
    """Moves a large table that came from elsewhere, such as a checkpoint, onto huge pages; once for a table.

    Memory that maps a file stays as it is: to move it would read the whole file. So does memory that came
    through a fork: this process would get a copy of it, and so would each of its siblings.
    """
    place = (table.data_ptr(), table.nbytes)
    if table.nbytes < HUGE_BYTES or place in _placed:
        return
    _placed.add(place)
    if sys.platform == "linux" and _is_anonymous(*place):
        _kernels.collapse_to_huge_pages(table)


def _is_anonymous(address: int, size: int) -> bool:
    """Whether memory maps no file, and no other process has a page of it; False where /proc does not say."""
    found = False
    try:
        with open("/proc/self/smaps") as mappings:
            for line in mappings:
                key, *fields = line.split(maxsplit=5)
                if not key.endswith(":"):
                    first, last = (int(end, 16) for end in key.split("-"))
                    ours = first < address + size and address < last
                    found |= ours
                    if ours and fields[3] != "0":
                        return False
                elif ours and key in ("Shared_Clean:", "Shared_Dirty:") and fields[0] != "0":
                    return False
    except OSError:
        return False
    return found


def _large_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; a large one on huge pages, in memory that was used before if there is any."""
    bytes_ = math.prod(shape) * dtype.itemsize
    if bytes_ < KEPT_BYTES:
        return torch.empty(shape, dtype=dtype)
    return _kernels.buffer(bytes_).view(dtype).view(shape)


def _sum_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def product_key_topk(query: Tensor, keys1: Tensor, keys2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `million_experts.ops.product_key_topk`."""
    T, H = query.shape[:2]
    dtype = accumulation_dtype(query, keys1, keys2)
    query, keys1, keys2 = (_sum_tensor(t, dtype) for t in (query, keys1, keys2))
    scores = torch.empty(T, H, k, dtype=dtype)
    indices = torch.empty(T, H, k, dtype=torch.int64)
    _kernels.product_key_topk(query, keys1, keys2, k, scores, indices, threads())
    return scores, indices


def product_key_topk_backward(
    grad_scores: Tensor, indices: Tensor, query: Tensor, keys1: Tensor, keys2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys1 and keys2; only the selected sub-keys get any."""
    dtype = accumulation_dtype(grad_scores, query, keys1, keys2)
    wide_query, wide_keys1, wide_keys2 = (_sum_tensor(t, dtype) for t in (query, keys1, keys2))
    grads = query_grad, keys1_grad, keys2_grad = tuple(
        torch.empty(t.shape, dtype=dtype) for t in (query, keys1, keys2)
    )
    grad_scores, indices = _sum_tensor(grad_scores, dtype), indices.contiguous()
    _kernels.product_key_topk_backward(
        grad_scores,
        indices,
        wide_query,
        wide_keys1,
        wide_keys2,
        query_grad,
        keys1_grad,
        keys2_grad,
        threads(),
    )
    grad_query, grad_keys1, grad_keys2 = (
        grad.to(t.dtype) for grad, t in zip(grads, (query, keys1, keys2), strict=True)
    )
    return grad_query, grad_keys1, grad_keys2


def _block(indices: Tensor, experts: Tensor, tokens: int) -> int:
    """`block_experts` for so many of the tokens, of which the indices [T, K] choose experts."""
    (T, K), (N, R, D) = indices.shape, experts.shape
    if max(T * K, N) >= MOST_PAIRS:
        raise ValueError(
            f"indices must hold fewer than 2**32 pairs of fewer than 2**32 experts, got {T} x {K} of {N}"
        )
    return block_experts(tokens, K, N, R * D * experts.element_size())


def expert_mlp(
    x: Tensor, indices: Tensor, gates: Tensor, experts: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """See `million_experts.ops.expert_mlp`; also returns the pre-activations [R - 1, T, K] for backward."""
    dtype = accumulation_dtype(x, gates, experts)
    if cpu_products.pays(x, indices, gates, experts):
        by_products = cpu_products.expert_mlp(x, indices, gates, experts, activation, threads())
        if by_products is not None:
            return by_products
    wide_x, wide_gates = _sum_tensor(x, dtype), _sum_tensor(gates, dtype)
    indices, experts = indices.contiguous(), experts.contiguous()
    _place_on_huge_pages(experts)
    y = torch.empty(x.shape, dtype=dtype)
    pre = torch.empty(experts.shape[1] - 1, *indices.shape, dtype=dtype)
    _kernels.expert_mlp_forward(
        wide_x, indices, wide_gates, experts, y, pre, ACTIVATIONS.index(activation),
        _block(indices, experts, len(x)), threads(),
    )  # fmt: skip
    return y.to(x.dtype), pre


def backward_tokens(tokens: int, experts_per_token: int, num_experts: int, rounded: bool) -> int:
    """How many tokens go backward at a time.

    The gradient of the table needs some numbers for each pair. Taking few tokens at a time bounds that
    memory, as long as adding to the gradient again costs little beside the pairs: from 32 pairs an expert on.
    A table narrower than the sums (`rounded`) is rounded once, at the end, so all tokens go at once.
    """
    if rounded:
        return max(1, tokens)
    K = max(1, experts_per_token)
    return min(max(256, math.ceil(32 * num_experts / K)), max(1, (MOST_PAIRS - 1) // K))


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
    if cpu_products.pays(x, indices, gates, experts):
        by_products = cpu_products.expert_mlp_backward(
            grad_y,
            x,
            indices,
            gates,
            experts,
            pre,
            activation,
            needs_x,
            needs_gates,
            needs_experts,
            threads(),
        )
        if by_products is not None:
            return by_products
    dtype = pre.dtype
    x_dtype, gates_dtype = x.dtype, gates.dtype
    grad_y, gates, pre = (_sum_tensor(t, dtype) for t in (grad_y, gates, pre))
    indices, experts = indices.contiguous(), experts.contiguous()
    (T, K), (N, R, _) = indices.shape, experts.shape
    grad_x = torch.empty(x.shape if needs_x else 0, dtype=dtype)
    grad_gates = torch.empty(gates.shape if needs_gates else 0, dtype=dtype)
    grad_experts = _large_empty(experts.shape, experts.dtype) if needs_experts else experts.new_empty(0)
    x = _sum_tensor(x, dtype) if needs_experts else x
    step = backward_tokens(T, K, N, experts.dtype != dtype)
    weights = torch.empty(min(step, T), K, R, dtype=dtype) if needs_experts else None

    for start in range(0, max(T, 1), step):  # once without tokens too: the gradient is zero then
        count = min(step, T - start)
        block = _block(indices, experts, count)
        _kernels.expert_mlp_backward(
            grad_y, indices, gates, experts, pre, grad_x if needs_x else None,
            grad_gates if needs_gates else None, weights, start, count, ACTIVATIONS.index(activation),
            block, threads(),
        )  # fmt: skip
        if weights is not None:
            _kernels.expert_mlp_table_grad(
                x, grad_y, indices, gates, experts, weights, grad_experts, start > 0, start, count, block,
                threads(),
            )  # fmt: skip
    return grad_x.to(x_dtype), grad_gates.to(gates_dtype), grad_experts


# Gradients that are used up as they come: about so many bytes at a time stay in the shared cache.
VISIT_BYTES = 8 * 2**20


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
    if cpu_products.pays(x, indices, gates, experts):
        by_products = cpu_products.expert_mlp_backward(
            grad_y, x, indices, gates, experts, pre, activation, needs_x, needs_gates, True, threads()
        )
        if by_products is not None:
            grad_x, grad_gates, grad_experts = by_products
            rows = cpu_products.used_experts(indices, len(experts))
            if visit is not None:
                visit(rows, grad_experts[rows])
                rows = rows[:0]
            return grad_x, grad_gates, rows, grad_experts[rows]
    dtype = pre.dtype
    x_dtype, gates_dtype = x.dtype, gates.dtype
    grad_y, x, gates, pre = (_sum_tensor(t, dtype) for t in (grad_y, x, gates, pre))
    indices, experts = indices.contiguous(), experts.contiguous()
    (T, K), (N, R, D) = indices.shape, experts.shape
    grad_x = torch.empty(x.shape if needs_x else 0, dtype=dtype)
    grad_gates = torch.empty(gates.shape if needs_gates else 0, dtype=dtype)
    weights = torch.empty(T, K, R, dtype=dtype)
    _kernels.expert_mlp_backward(
        grad_y, indices, gates, experts, pre, grad_x if needs_x else None,
        grad_gates if needs_gates else None, weights, 0, T, ACTIVATIONS.index(activation),
        _block(indices, experts, T), threads(),
    )  # fmt: skip
    # A sorted pair is two 32-bit numbers and its R weights.
    sorted_pairs = torch.empty(T * K, 8 + R * dtype.itemsize, dtype=torch.uint8)
    starts = torch.empty(min(N, T * K) + 1, dtype=torch.int64)
    touched = _kernels.expert_mlp_sort(indices, gates, experts, weights, sorted_pairs, starts, T, threads())
    del weights
    most = touched if visit is None else max(1, VISIT_BYTES // (R * D * experts.element_size()))
    size = min(most, touched)
    rows, values = torch.empty(size, dtype=torch.int64), _large_empty((size, R, D), experts.dtype)
    for first in range(0, touched, max(1, most)):
        count = min(most, touched - first)
        _kernels.expert_mlp_touched_grad(
            x, grad_y, indices, gates, experts, sorted_pairs, starts, first, count, rows, values, threads()
        )
        if visit is not None:
            visit(rows[:count], values[:count])
    if visit is not None:
        rows, values = rows[:0], values[:0]
    return grad_x.to(x_dtype), grad_gates.to(gates_dtype), rows, values


def masked_batch_norm(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `million_experts.ops.masked_batch_norm`."""
    dtype = accumulation_dtype(x)
    x, weight, bias = (_sum_tensor(t, dtype) for t in (x, weight, bias))
    mask = mask if mask is None else mask.contiguous()
    y, mean, variance = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    _kernels.batch_norm(x, mask, weight, bias, eps, y, mean, variance, threads())
    return y, mean, variance


def masked_batch_norm_backward(
    grad_y: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; none of a masked token's."""
    dtype = mean.dtype
    grad_y, wide_x, wide_weight, mean, variance = (
        _sum_tensor(t, dtype) for t in (grad_y, x, weight, mean, variance)
    )
    mask = mask if mask is None else mask.contiguous()
    grad_x = torch.empty_like(wide_x)
    grad_weight, grad_bias = torch.empty_like(wide_weight), torch.empty_like(wide_weight)
    _kernels.batch_norm_backward(
        grad_y, wide_x, mask, wide_weight, mean, variance, eps, grad_x, grad_weight, grad_bias, threads()
    )
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


_QUERY_NORMS = ("none", "batch", "layer")
_SCORES = ("softmax", "sigmoid", "relu")


def layer_inference(
    x: Tensor,
    query_weight: Tensor,
    query_norm: str,
    norm: list[Tensor],
    eps: float,
    keys1: Tensor,
    keys2: Tensor,
    experts: Tensor,
    num_heads: int,
    k: int,
    score: str,
    activation: str,
) -> Tensor:
    """A PEER layer's output [T, D] for x [T, D] in eval mode: meant for few tokens, one above all.

    All tensors are float32, but for the experts, which may be narrower. `norm` has weight and bias of the
    query norm, for "batch" followed by the running mean and variance; nothing for "none". All but x must be
    contiguous.

    Raises:
        TypeError: an argument is no plain tensor.
        ValueError: one has another dtype, shape, order or device.
    """
    x = x.contiguous()
    y = torch.empty(x.shape)
    _kernels.layer_inference(
        x, query_weight, _QUERY_NORMS.index(query_norm), norm, eps, keys1, keys2, experts, num_heads, k,
        _SCORES.index(score), ACTIVATIONS.index(activation), y, threads(),
    )  # fmt: skip
    return y


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
    changed = (table, exp_avg, exp_avg_sq, last_step, history)
    assert all(t is None or t.is_contiguous() for t in changed), "what is changed in place must be contiguous"
    check_row_state(*changed, step)
    if values is not None:
        check_shape("values", values, (len(values), *table.shape[1:]))
    if values is not None and values.dtype not in (table.dtype, exp_avg_sq.dtype):
        values = values.to(exp_avg_sq.dtype)
    rows, values, places, starts = (
        t if t is None else t.contiguous() for t in (rows, values, places, starts)
    )
    _place_on_huge_pages(table)
    _kernels.rowwise_adamw(
        table, exp_avg, exp_avg_sq, last_step, history, step, rows, values, places, starts, lr, *betas, eps,
        weight_decay, key is not None, key or 0, threads(),
    )  # fmt: skip


def random_row_read(table: Tensor, rows: Tensor) -> int:
    """Reads whole rows of a table [M, C] at `rows` int64 and returns a checksum: a measure for `expert_mlp`.

    Raises:
        IndexError: a row outside [0, M).
    """
    check_range("rows", rows, len(table), "the rows of the table")
    return _kernels.random_read(table.contiguous().flatten(1), rows.contiguous().flatten(), threads())
