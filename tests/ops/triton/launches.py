"""What is launched so that each kernel is compiled in each of its forms; `compile_kernels` compiles it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from million_experts.ops import triton_retrieval, triton_rowwise

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


def _retrieval(
    k: int, d: int, query: torch.dtype, keys: torch.dtype, shared: bool, sizes: tuple[int, int, int, int]
) -> None:
    T, H, *both = sizes
    keys1, keys2 = (
        torch.empty(n, d, dtype=keys) if shared else torch.empty(H, n, d, dtype=keys) for n in both
    )
    queries = torch.empty(T, H, 2, d, dtype=query)
    triton_retrieval.product_key_topk(queries, keys1, keys2, k)
    picks = torch.zeros(T, H, k, dtype=torch.int64)
    triton_retrieval.product_key_topk_backward(torch.empty(T, H, k), picks, queries, keys1, keys2)


def _rowwise(D: int, R: int, table, momentum, values, by_row: bool, gathered: bool, key: int | None) -> None:
    N, n = 64, 16
    whole = torch.int64
    state = (
        torch.empty(N, R, D, dtype=table),
        None if momentum is None else torch.empty(N, R, D, dtype=momentum),
        torch.empty((N, R) if by_row else (N, R, D)),
        torch.zeros(N, dtype=torch.int32),
        torch.zeros(10, 3, dtype=torch.float64),
    )
    options = 1e-3, (0.0 if momentum is None else 0.9, 0.99), 1e-8, 0.1, key
    places, starts = (
        (torch.zeros(n, dtype=whole), torch.zeros(n + 1, dtype=whole)) if gathered else (None, None)
    )
    rows = torch.zeros(n, dtype=whole)
    triton_rowwise.rowwise_adamw(
        *state, 7, rows, torch.empty(n, R, D, dtype=values), places, starts, *options
    )
    triton_rowwise.rowwise_adamw(*state, 7, None, None, None, None, *options)


def _cases() -> Iterator[tuple]:
    usual = [
        (k, 64, *pair, True) for k in (1, 16, 32, 64) for pair in ((f32, f32), (bf16, bf16), (bf16, f32))
    ]
    wide = [(k, d, t, t, d == 128) for k in (16, 32, 64) for d in (128, 200) for t in (f32, bf16)]
    for k, d, query, keys, shared in (*usual, (16, 64, f16, f16, False), *wide):
        name = f"retrieval k={k} d={d} {query} {keys} shared={shared}"
        quick = (k, d, query, keys) == (16, 64, bf16, bf16)
        yield name, quick, lambda a=(k, d, query, keys, shared, (64, 8, 1024, 1024)): _retrieval(*a)
    # Triton makes other code for a number that is 1 and for one that is no multiple of 16.
    odd = itertools.product(
        ((1, 1, 128, 128), (3, 1, 100, 70), (5, 3, 1024, 900)), ((1, 16), (3, 1), (8, 32), (40, 100))
    )
    types = (f32, f32), (bf16, bf16), (f32, bf16), (f16, f16)
    for i, (sizes, (k, d)) in enumerate(odd):
        query, keys = types[(i + i // 4) % 4]
        name = f"retrieval T, H, n1, n2={sizes} k={k} d={d} {query} {keys} shared={i % 2 == 0}"
        yield name, False, lambda a=(k, d, query, keys, i % 2 == 0, sizes): _retrieval(*a)
    sizes = ((64, 2), (256, 2), (256, 3), (1000, 2), (8192, 2), (8192, 3))
    forms = (
        (f32, f32, f32, False, False, None),
        (f32, f32, f32, False, True, None),
        (bf16, bf16, bf16, True, False, 1),
        (bf16, bf16, bf16, True, True, 1),
        (bf16, f32, f32, False, True, 1),
        (f16, f32, f16, False, False, None),
        (f32, None, f32, True, False, None),
        (bf16, None, bf16, True, True, 1),
    )
    for (D, R), form in itertools.product(sizes, forms):
        table, momentum, values, by_row, gathered, key = form
        name = f"rowwise D={D} R={R} {table} {momentum} {values} by_row={by_row} gathered={gathered} {key}"
        quick = (D, R) == (8192, 3) and by_row and gathered
        yield name, quick, lambda a=(D, R, *form): _rowwise(*a)


CASES = list(_cases())
