"""Launches that compile every kernel of the experts in each of its forms; `compile_kernels` compiles them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest.mock import patch

import torch

from million_experts.ops import ACTIVATIONS, triton_experts
from million_experts.ops.triton_expert_rows import ByToken
from million_experts.ops.triton_expert_tiles import ByTiles

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


# Tokens, picks of a token, experts. Here there are 1,024 pairs: experts may have more than a part holds.
USUAL = 64, 16, 64

# Triton makes other code for a number that is 1 and for one that is no multiple of 16, and so for a row of
# weights behind an odd number of pairs.
ODD = (1, 128, 4096), (301, 7, 5), (1, 1, 1)


def _step(
    walk: type,
    sizes: tuple[int, int, int],
    D: int,
    R: int,
    activation: str,
    x_dtype: torch.dtype,
    table: torch.dtype,
) -> None:
    T, K, N = sizes
    x, gates, pre = (
        torch.empty(T, D, dtype=x_dtype),
        torch.empty(T, K, dtype=x_dtype),
        torch.empty(R - 1, T, K),
    )
    indices, experts = torch.zeros(T, K, dtype=torch.int64), torch.empty(N, R, D, dtype=table)
    with patch.object(triton_experts, "schedule", lambda *_: walk):
        triton_experts.expert_mlp(x, indices, gates, experts, activation)
        triton_experts.expert_mlp_backward(x, x, indices, gates, experts, pre, activation, True, True, True)
        triton_experts.expert_mlp_backward_touched(
            x, x, indices, gates, experts, pre, activation, True, False
        )


def _cases() -> Iterator[tuple]:
    dtypes = ((f32, f32), (bf16, bf16), (f16, f16), (f32, bf16), (bf16, f32))
    for walk, D, R, (x_dtype, table) in itertools.product(
        (ByToken, ByTiles), (64, 256, 1000, 8192, 99), (2, 3), dtypes
    ):
        if D in (1000, 99) and x_dtype != table:
            continue
        activation = ACTIVATIONS[(D + R) % 3]
        usual = ((f32, f32), (bf16, bf16)) if walk is ByToken else ((bf16, bf16),)
        quick = (D, R) == (256, 3) and (x_dtype, table) in usual
        name = f"experts {walk.__name__} D={D} R={R} {x_dtype} {table}"
        yield name, quick, lambda a=(walk, USUAL, D, R, activation, x_dtype, table): _step(*a)
    for activation, R in itertools.product(ACTIVATIONS, (2, 3)):
        yield (
            f"experts {activation} R={R}",
            activation == "gelu",
            lambda a=(ByToken, USUAL, 64, R, activation, f32, f32): _step(*a),
        )
    for walk, sizes, dtype in itertools.product((ByToken, ByTiles), ODD, (f32, bf16)):
        for D, R in ((256, 3), (99, 2)):
            name = f"experts {walk.__name__} T, K, N={sizes} D={D} R={R} {dtype}"
            yield name, False, lambda a=(walk, sizes, D, R, "gelu", dtype, dtype): _step(*a)


CASES = list(_cases())
