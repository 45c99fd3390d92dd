"""The optimiser's kernel, and what PyTorch does between the kernels."""

import numpy as np

from million_experts.benchmarks.triton_traffic.accesses import INDEX, SUM, Accesses, Kernel, Stream, sectors


def adamw(n: int, R: int, D: int, steps: int, table: int, momentum: int, values: int, by_row: bool) -> Kernel:
    """`adamw_kernel` for n rows with one gradient each, which missed steps of the last `steps`.

    `table`, `momentum` and `values` are bytes of a number; `momentum` is 0 where no first moment is kept.
    """
    width = R * D
    state = [
        Stream("last_step", n * 4),
        Stream("table", n * width * table),
        Stream("exp_avg_sq", n * (R if by_row else width) * SUM),
    ]
    if momentum:
        state.append(Stream("exp_avg", n * width * momentum))
    accesses: Accesses = [
        *state,  # read
        *state,  # written
        Stream("rows", n * INDEX),
        Stream("history", steps * 3 * 8, n * 6 / (steps * 3)),
        Stream("values", n * width * values),
    ]
    # A number takes some 50 instructions, an estimate: two divisions or so, a root, the random bits.
    return Kernel(accesses, {"float32": 2 * 50 * n * width})


def fill(bytes_: float) -> Kernel:
    """Zeros, or any other tensor that is written from end to end."""
    return Kernel([Stream("out", bytes_)], {})


def pick(picks: np.ndarray, N: int) -> Kernel:
    """`torch.gather` of float32 [T, N] at picks [T, K]."""
    P = picks.size
    return Kernel(
        [Stream("dense", sectors(picks, N)), Stream("indices", P * INDEX), Stream("out", P * SUM)], {}
    )


def add_parts(parts: int, N: int, D: int) -> Kernel:
    """`total += parts.sum(0)` for a row of N experts: the sum is written, read again, and added."""
    return Kernel([Stream("parts", parts * N * D * SUM), Stream("sum and total", 4 * N * D * SUM)], {})


def convert(numbers: int, out: int) -> Kernel:
    """float32 to a type of `out` bytes."""
    return Kernel([Stream("in", numbers * SUM), Stream("out", numbers * out)], {})


# A radix sort of int32 keys with int64 positions: 8 bits a pass, each reading and writing both; before them
# the positions are written and the keys are read once. As CUB does it: an estimate, not traced.
SORT = 4 * 2 * (4 + 8) + 8 + 4


def sort_pairs(P: int, M: int) -> Kernel:
    """`sort_pairs`, and M experts with their numbers of pairs. Scans are counted at one pass each."""
    return Kernel([Stream("pairs", P * (8 + 4 + SORT + 4)), Stream("experts", M * 5 * INDEX)], {})


def sort_selections(selections: int) -> Kernel:
    """`_sort_selections`: a conversion, five int32 passes to tell both halves, the sort of both."""
    return Kernel([Stream("selections", selections * (12 + 8 + 8 + 12 + 8 + 16 + 2 * SORT))], {})
