"""The kernels of `ops.triton_expert_rows`: the experts, token by token."""

from dataclasses import dataclass

import numpy as np

from million_experts.benchmarks.triton_traffic.accesses import (
    INDEX,
    SECTOR,
    SUM,
    Accesses,
    Gather,
    Kernel,
    Numbers,
    Picks,
    Stream,
    split,
    up,
)
from million_experts.ops import triton_expert_rows as by_rows


def dots(picks: Picks, T: int, D: int, slots: int, x: int, table: int) -> Kernel:
    """`dots_kernel`: T tokens of `x` bytes a number with `slots` rows, 1 or 2, of the experts picked."""
    K, block_k = len(picks.rows) // T, by_rows.DOTS_CONFIGS[0].kwargs["ROWS"] // slots
    accesses: Accesses = [
        Stream("source", T * D * x, split(K, block_k)),
        Stream("indices", T * K * INDEX),
        Gather("table", picks, slots * D * table),
        Stream("out", slots * T * K * SUM),
    ]
    products = slots * T * up(K, block_k) * up(D, by_rows.DOTS_COLUMNS)
    return Kernel(accesses, {"float32": 2 * products}, min(K, block_k))


def mix(picks: Picks, T: int, D: int, slots: int, table: int, out: int) -> Kernel:
    """`mix_kernel`: sums of `slots` rows of the experts that T tokens picked."""
    config = by_rows.MIX_CONFIGS[0].kwargs
    K, chunks = len(picks.rows) // T, split(D, config["BLOCK_D"])
    weights = [Stream(name, T * K * SUM, chunks) for name in ("weights", "second_weights")[:slots]]
    accesses: Accesses = [
        *weights,
        Stream("indices", T * K * INDEX, chunks),
        Gather("table", picks, slots * D * table),
        Stream("out", T * D * out),
    ]
    products = slots * T * up(K, config["UNROLL"]) * chunks * config["BLOCK_D"]
    return Kernel(accesses, {"float32": 2 * products}, K)


# Instructions of an activation and its slope, erf and exp included: an estimate. Memory still binds at twice
# as many.
ACTIVATION = 50


def output_weights(P: int, R: int, gates: int) -> Kernel:
    """`output_weights_kernel`."""
    accesses: Accesses = [
        Stream("pre", (R - 1) * P * SUM),
        Stream("gates", P * gates),
        Stream("weights", P * SUM),
    ]
    return Kernel(accesses, {"float32": 2 * ACTIVATION * P})


def gradient_weights(P: int, R: int, gates: int) -> Kernel:
    """`gradient_weights_kernel`."""
    accesses: Accesses = [
        Stream("upward", P * SUM),
        Stream("pre", (R - 1) * P * SUM),
        Stream("gates", P * gates),
        Stream("grad_gates", P * gates),
        Stream("weights", R * P * SUM),
    ]
    return Kernel(accesses, {"float32": 2 * ACTIVATION * P})


@dataclass(frozen=True)
class RowSums:
    """The table's gradient from pairs sorted by expert; those with more than `length` are summed in parts."""

    order: np.ndarray  # [P]: the sorted pairs
    counts: np.ndarray  # [M]: pairs of each expert
    K: int
    D: int
    R: int
    x: int

    @classmethod
    def of(cls, picks: np.ndarray, N: int, D: int, R: int, x: int) -> "RowSums":
        """For picks [T, K] of N experts."""
        flat = picks.ravel()
        order, counts = np.argsort(flat, kind="stable"), np.bincount(flat, minlength=N)
        return cls(order, counts, picks.shape[1], D, R, x)

    @property
    def length(self) -> int:
        return by_rows.part_length(len(self.order), self.R, self.D)

    @property
    def chunks(self) -> int:
        return split(self.D, by_rows.TABLE_CONFIGS[0].kwargs["BLOCK_D"])

    @property
    def most(self) -> int:
        """Parts that there may be: none where a part holds all pairs."""
        return by_rows.most_parts(len(self.order), self.length)

    @property
    def parts(self) -> int:
        """Parts that there are."""
        return int(np.sum(-(-self.counts[self.in_parts] // self.length)))

    @property
    def in_parts(self) -> np.ndarray:
        """[M]: whether an expert is summed in parts."""
        return self.counts > self.length

    def sums(self, of_parts: bool) -> Accesses:
        """What either kernel reads of its pairs."""
        pairs = self.order[np.repeat(self.in_parts == of_parts, self.counts)]
        tokens = Picks(pairs // self.K)
        return [
            Gather("x", tokens, self.D * self.x),
            Gather("grad_y", tokens, self.D * self.x),
            Numbers("weights", Picks(pairs * SUM // SECTOR), self.R * SECTOR,
                    self.R * len(pairs) * SUM, self.chunks),
            Stream("order", len(pairs) * INDEX, self.chunks),
        ]  # fmt: skip

    def work(self, of_parts: bool) -> dict[str, float]:
        config = by_rows.TABLE_CONFIGS[0].kwargs
        counts = self.counts[self.in_parts == of_parts]
        steps = np.sum(-(-counts // config["UNROLL"])) * config["UNROLL"]
        return {"float32": 2 * self.R * float(steps) * self.chunks * config["BLOCK_D"]}


def _some(tensor: str, bytes_: float, issued: float) -> Stream:
    """Some numbers of a small tensor, which are read again and again."""
    return Stream(tensor, min(bytes_, issued), max(1.0, issued / bytes_))


def table_parts(s: RowSums) -> Kernel:
    """`table_parts_kernel`."""
    size = (len(s.counts) + 1) * INDEX
    accesses: Accesses = [
        *s.sums(of_parts=True),
        _some("starts", size, 2 * s.parts * s.chunks * INDEX),
        _some("part_starts", size, (s.most + s.parts) * s.chunks * INDEX),
        _some("owners", s.most * INDEX, s.parts * s.chunks * INDEX),
        Stream("parts", s.parts * s.R * s.D * SUM),
    ]
    return Kernel(accesses, s.work(of_parts=True), s.length)


def table_rows(s: RowSums, out: int) -> Kernel:
    """`table_rows_kernel`, with a gradient of `out` bytes a number."""
    M = len(s.counts)
    starts, part_starts = (
        Stream(name, (M + 1) * INDEX, 2 * M * s.chunks / (M + 1)) for name in ("starts", "part_starts")
    )
    accesses = [*s.sums(of_parts=False), starts, Stream("values", M * s.R * s.D * out, past=True)]
    if s.most:
        accesses.append(part_starts)
    if s.parts:
        accesses.append(Stream("parts", s.parts * s.R * s.D * SUM))
    return Kernel(accesses, s.work(of_parts=False))
