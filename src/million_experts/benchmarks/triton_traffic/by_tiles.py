"""The kernels of `ops.triton_expert_tiles`: tiles of tokens against blocks of experts."""

import numpy as np

from million_experts.benchmarks.triton_traffic.accesses import (
    INDEX,
    SUM,
    Accesses,
    Kernel,
    Stream,
    sectors,
    split,
    up,
)
from million_experts.ops import triton_expert_tiles as by_tiles


def _tensor_cores(accesses: Accesses, T: int, N: int, D: int, exact: bool) -> Kernel:
    """A product of matrices of these padded sizes; `exact`: as they are, else float32, in three of tf32."""
    products = 2 * T * N * D
    return Kernel(accesses, {"narrow": products} if exact else {"tf32": 3 * products}, products=products)


def tile_dots(T: int, N: int, D: int, x: int, table: int) -> Kernel:
    """`tile_dots_kernel`: a row of all N experts."""
    tile_t, tile_n = by_tiles.TILE_TOKENS, by_tiles.TILE_EXPERTS
    accesses: Accesses = [
        Stream("source", T * D * x, split(N, tile_n)),
        Stream("table", N * D * table, split(T, tile_t), apart=True),
        Stream("dense", T * N * SUM),
    ]
    padded = up(T, tile_t), up(N, tile_n), up(D, by_tiles.DEPTH)
    return _tensor_cores(accesses, *padded, exact=x == table == 2)


def spread(picks: np.ndarray, N: int) -> Kernel:
    """`spread_kernel` for picks [T, K]. Memory takes a sector, 8 numbers, where one of them is written."""
    T, K = picks.shape
    chunks, written = split(K, by_tiles.SPREAD), sectors(picks, N)
    accesses: Accesses = [
        Stream("indices", T * K * INDEX, 1 + chunks),
        Stream("weights", T * K * SUM, chunks),
        Stream("dense", written, T * K * SUM / written),
    ]
    # All picks of a token meet all: compare, which takes two integer instructions, select, add.
    pairs = T * (chunks * by_tiles.SPREAD) ** 2
    return Kernel(accesses, {"integer": 2 * pairs, "float32": 2 * 2 * pairs})


def tile_mix(T: int, N: int, D: int, slots: int, table: int, out: int) -> Kernel:
    """`tile_mix_kernel`: sums of `slots` rows of all N experts."""
    tile_t, tile_d = by_tiles.TILE_TOKENS, by_tiles.TILE_COLUMNS
    matrices = [Stream(name, T * N * SUM, split(D, tile_d)) for name in ("dense", "second_dense")[:slots]]
    accesses: Accesses = [
        *matrices,
        Stream("table", slots * N * D * table, split(T, tile_t), apart=True),
        Stream("out", T * D * out),
    ]
    padded = up(T, tile_t), slots * up(N, by_tiles.DEPTH), up(D, tile_d)
    return _tensor_cores(accesses, *padded, exact=False)


def table_parts_of_tiles(T: int, N: int, D: int) -> int:
    """Sums in which `ByTiles.table_gradient` splits the tokens."""
    return split(T, by_tiles.tokens_of_a_part(T, N, D))


def tile_table(T: int, N: int, D: int, x: int) -> Kernel:
    """`tile_table_kernel`: a row of all N experts."""
    tile_n, tile_d, parts = by_tiles.TILE_EXPERTS, by_tiles.TILE_COLUMNS, table_parts_of_tiles(T, N, D)
    accesses: Accesses = [
        Stream("source", T * D * x, split(N, tile_n), apart=True),
        Stream("dense", T * N * SUM, split(D, tile_d)),
        Stream("parts", parts * N * D * SUM),
    ]
    padded = up(T, by_tiles.DEPTH), up(N, tile_n), up(D, tile_d)
    return _tensor_cores(accesses, *padded, exact=False)
