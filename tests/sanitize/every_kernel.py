"""Calls every kernel at shapes where an index goes wrong most easily; a sanitizer watches.

Legend: T tokens, K experts per token, N experts, R rows of an expert, D width, H heads, d half a key,
n sub-keys, k experts per head, C channels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import sanitized  # noqa: F401  (first of all)
import torch
from torch import Tensor

from million_experts.ops import ACTIVATIONS, cpu, cpu_products
from million_experts.optim import RowwiseAdamW

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Widths around those of vectors: 1, then 4, 8, 16 and 32 numbers, one less and one more, and long ones.
EXPERT_SHAPES_TKND = (
    (0, 3, 5, 4), (1, 1, 1, 1), (1, 1, 7, 1), (3, 2, 5, 3), (2, 1, 4, 7), (5, 7, 11, 9), (4, 3, 8, 15),
    (3, 5, 13, 16), (2, 9, 3, 17), (2, 3, 9, 31), (4, 5, 13, 33), (3, 4, 6, 64), (1, 16, 20, 65),
    (2, 9, 20, 100), (17, 8, 30, 257), (70, 3, 2, 12), (129, 2, 300, 5),
    (1100, 3, 70_000, 2),  # more than a tile of tokens, and experts whose numbers take more than 16 bits
    (410, 4, 50, 33), (600, 9, 20, 18),  # tokens go backward in parts, which add up row by row and by columns
)  # fmt: skip
LARGE_SHAPE_TKND = (5, 3, 33_000, 128)  # a gradient that goes past the caches
EXPERT_DTYPES = (
    (F32, F32),
    (F32, BF16),
    (F32, F16),
    (F64, F64),
    (BF16, BF16),
    (F16, F16),
    (F64, BF16),
    (F32, F64),
)
RETRIEVAL_SHAPES_THdnnk = (
    (0, 1, 4, 3, 3, 2), (1, 1, 1, 1, 1, 1), (3, 2, 5, 7, 5, 5), (1, 1, 3, 2, 9, 1), (2, 3, 17, 33, 31, 8),
    (5, 1, 64, 128, 128, 16), (2, 2, 9, 100, 40, 40), (3, 1, 16, 65, 63, 33), (700, 2, 8, 15, 17, 4),
    (2, 1, 31, 300, 257, 3), (1, 2, 4, 70, 70, 70),
)  # fmt: skip
LAYER_SHAPES_TDHdnnk = (
    (1, 1, 1, 1, 1, 1, 1), (1, 16, 2, 8, 9, 7, 3), (3, 33, 3, 5, 17, 31, 17), (2, 65, 8, 16, 64, 64, 16),
)  # fmt: skip
NORM_SHAPES_TC = ((1, 1), (2, 3), (3, 16), (5, 17), (64, 31), (65, 33), (129, 64), (1000, 5), (7, 257))
THREADS = (1, 3)


def values(*shape: int, dtype: torch.dtype, kind: str = "normal") -> Tensor:
    """Numbers of a kind that may lead an index or a comparison astray."""
    x = torch.randn(shape, dtype=F64)
    if kind == "ties":
        x = x.round()
    elif kind == "nan":
        x[x > 1] = float("nan")
    elif kind == "infinite":
        x[x > 1], x[x < -1] = float("inf"), float("-inf")
    elif kind == "all nan":
        x.fill_(float("nan"))
    return x.to(dtype)


KINDS = ("normal", "ties", "nan", "infinite", "all nan")


def picks(T: int, K: int, N: int) -> Iterator[Tensor]:
    yield torch.randint(N, (T, K))
    yield torch.full((T, K), N - 1)


def visit(rows: Tensor, grads: Tensor) -> None:
    assert len(rows) == len(grads)


def row_updates() -> None:
    tables = ((F32, None), (F32, BF16), (F64, None), (BF16, BF16), (F16, None))
    for (N, R, D), (dtype, momentum) in itertools.product(((1, 2, 1), (9, 3, 17), (70, 2, 33)), tables):
        for second_moment, stochastic, beta1 in itertools.product(
            ("element", "row"), (True, False), (0.9, 0.0)
        ):
            table = torch.nn.Parameter(values(N, R, D, dtype=dtype))
            optimizer = RowwiseAdamW(
                [table],
                betas=(beta1, 0.99),
                weight_decay=0.1,
                second_moment=second_moment,
                momentum_dtype=momentum,
                stochastic_rounding=stochastic,
            )
            for rows in ([0], [N - 1, 0, N - 1], [], list(range(N))):
                grads = values(len(rows), R, D, dtype=dtype, kind="nan" if rows == [0] else "normal")
                index = torch.tensor([rows], dtype=torch.int64)
                table.grad = torch.sparse_coo_tensor(index, grads, (N, R, D), check_invariants=False)
                optimizer.step()
            optimizer.flush()


def experts() -> None:
    own_schedule = cpu.block_experts
    cases = [
        *itertools.product(EXPERT_SHAPES_TKND, EXPERT_DTYPES, (2, 3), (None, 1, 4)),
        (LARGE_SHAPE_TKND, (F32, F32), 2, None),
        (LARGE_SHAPE_TKND, (F32, BF16), 3, None),
    ]
    activations = itertools.cycle(ACTIVATIONS)
    kinds = itertools.cycle(KINDS)
    needed = itertools.cycle(itertools.product((True, False), repeat=3))
    for (T, K, N, D), (dtype, table_dtype), R, block in cases:
        # So many experts at a time: left to itself the schedule would be the same for all of these.
        size = N if block is None else min(N, block if N < 1000 else 2**13)
        cpu.block_experts = lambda *_, size=size: size
        for indices in picks(T, K, N):
            activation, kind = next(activations), next(kinds)
            x, grad_y = values(T, D, dtype=dtype, kind=kind), values(T, D, dtype=dtype, kind=kind)
            gates, table = values(T, K, dtype=dtype), values(N, R, D, dtype=table_dtype, kind=kind)
            _, pre = cpu.expert_mlp(x, indices, gates, table, activation)
            for flags in ((True, True, True), next(needed)):
                cpu.expert_mlp_backward(grad_y, x, indices, gates, table, pre, activation, *flags)
                cpu.expert_mlp_backward_touched(
                    grad_y, x, indices, gates, table, pre, activation, *flags[:2], visit if flags[2] else None
                )
    cpu.block_experts = own_schedule


def experts_by_products() -> None:
    activations, kinds = itertools.cycle(ACTIVATIONS), itertools.cycle(KINDS)
    for (T, K, N, D), table_dtype, R in itertools.product(EXPERT_SHAPES_TKND, (F32, BF16), (2, 3)):
        for indices in picks(T, K, N):
            kind, activation = next(kinds), next(activations)
            x, grad_y = values(T, D, dtype=BF16, kind=kind), values(T, D, dtype=BF16)
            inputs = (x, indices, values(T, K, dtype=F32), values(N, R, D, dtype=table_dtype))
            done = cpu_products.expert_mlp(*inputs, activation, cpu.threads())
            pre = values(R - 1, T, K, dtype=F32) if done is None else done[1]
            for flags in ((True, True, True), (False, True, False), (True, False, False)):
                cpu_products.expert_mlp_backward(grad_y, *inputs, pre, activation, *flags, cpu.threads())


def retrieval() -> None:
    cases = itertools.product(RETRIEVAL_SHAPES_THdnnk, (F32, F64, BF16, F16), (True, False), KINDS)
    for (T, H, d, n1, n2, k), dtype, shared, kind in cases:
        query = values(T, H, 2, d, dtype=dtype, kind=kind)
        keys1, keys2 = (values(*(() if shared else (H,)), n, d, dtype=dtype, kind=kind) for n in (n1, n2))
        scores, indices = cpu.product_key_topk(query, keys1, keys2, k)
        assert ((indices >= 0) & (indices < n1 * n2)).all()
        cpu.product_key_topk_backward(scores, indices, query, keys1, keys2)


def batch_norm() -> None:
    for (T, C), dtype, masked, kind in itertools.product(NORM_SHAPES_TC, (F32, F64), (0, 1, 2), KINDS):
        x, weight, bias = values(T, C, dtype=dtype, kind=kind), values(C, dtype=dtype), values(C, dtype=dtype)
        mask = (None, torch.rand(T) < 0.5, torch.zeros(T, dtype=torch.bool))[masked]
        y, mean, variance = cpu.masked_batch_norm(x, mask, weight, bias, 1e-5)
        cpu.masked_batch_norm_backward(y, x, mask, weight, mean, variance, 1e-5)


def whole_layer() -> None:
    cases = itertools.product(
        LAYER_SHAPES_TDHdnnk,
        ("none", "batch", "layer"),
        ("softmax", "sigmoid", "relu"),
        (F32, BF16, F16),
        (2, 3),
    )
    activations, kinds = itertools.cycle(ACTIVATIONS), itertools.cycle(KINDS)
    for (T, D, H, d, n1, n2, k), norm, score, dtype, R in cases:
        kind = next(kinds)
        width = H * 2 * d
        per_head = 2 * d if norm == "layer" else width
        norms = [torch.rand(per_head) + 0.5 for _ in range({"none": 0, "batch": 4, "layer": 2}[norm])]
        shared = () if kind in ("normal", "nan") else (H,)
        cpu.layer_inference(
            values(T, D, dtype=F32, kind=kind), values(width, D, dtype=F32), norm, norms, 1e-5,
            values(*shared, n1, d, dtype=F32), values(*shared, n2, d, dtype=F32),
            values(n1 * n2, R, D, dtype=dtype), H, k, score, next(activations),
        )  # fmt: skip


def rows_and_buffers() -> None:
    for rows, width in ((1, 1), (7, 3), (50, 64), (33, 257)):
        cpu.random_row_read(values(rows, width, dtype=F32), torch.randint(rows, (100,)))
    for count in (cpu.KEPT_BYTES // 4, cpu.KEPT_BYTES // 4 + 1, cpu.HUGE_BYTES // 4 + 3):
        for _ in range(2):
            buffer = cpu._large_empty((count,), torch.float32)
            buffer.fill_(1)
            cpu.advise_huge_pages(buffer)
            del buffer
    cpu.release_buffers()


def main() -> None:
    for instruction_set in cpu.instruction_sets():
        cpu.use_instruction_set(instruction_set)
        for threads in THREADS:
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            for kernels in (
                experts,
                experts_by_products,
                row_updates,
                retrieval,
                batch_norm,
                whole_layer,
                rows_and_buffers,
            ):
                start = time.monotonic()
                kernels()
                seconds = time.monotonic() - start
                print(f"{instruction_set}, {threads} threads: {kernels.__name__} {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
