"""What operations and layers must move and compute at a shape, whoever computes it.

Bytes: each tensor of an operation is read or written once, and of a table the rows that are used. FLOPs: a
multiply-add is two. Both are the least that there is: `docs/kernels.md` counts what the kernels move.
"""

import math
from dataclasses import dataclass

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
INDEX, SUM = 8, 4  # bytes of a pick and of what is summed in float32


@dataclass(frozen=True)
class Shape:
    """T tokens, H heads of k experts of n * n, D numbers per row, R rows per expert, d per sub-key."""

    T: int
    n: int
    D: int
    dtype: str = "bfloat16"
    H: int = 8
    k: int = 16
    R: int = 2
    d: int = 64

    @property
    def N(self) -> int:
        return self.n**2

    @property
    def K(self) -> int:
        return self.H * self.k

    @property
    def pairs(self) -> int:
        return self.T * self.K

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    @property
    def distinct(self) -> float:
        """Experts that uniform picks use, each counted once, on average."""
        return -self.N * math.expm1(self.pairs * math.log1p(-1 / self.N)) if self.N > 1 else 1.0

    @property
    def name(self) -> str:
        return f"T={self.T} N={self.n}^2 D={self.D} {self.dtype}" + (" GLU" if self.R == 3 else "")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Cost:
    """Bytes that must move, and floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: float) -> "Cost":
        return Cost(self.bytes * count, self.flops * count)


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: bytes per second of a copy, read and written; FLOP/s of products by dtype."""

    copy: float
    products: dict[str, float]

    def seconds(self, cost: Cost, dtype: str) -> float:
        """The least time."""
        return max(cost.bytes / self.copy, cost.flops / self.products[dtype])


#: Ceilings that plans are made with, an H200's; what rows are compared with is measured in the run itself.
PLANNED = Ceilings(4.3e12, {"bfloat16": 7.8e14, "float16": 7.8e14, "float32": 5e13, "float64": 3e13})

OPERATIONS = (
    "retrieval, forward",
    "retrieval, backward",
    "experts, forward",
    "experts, backward to the touched rows",
    "experts, backward, dense",
    "row-wise AdamW",
)


def operation(name: str, shape: Shape, distinct: float | None = None) -> Cost:
    """One of `OPERATIONS`; it uses `distinct` experts, by default as many as uniform picks do."""
    s, size = shape, shape.size
    rows = s.distinct if distinct is None else distinct
    if name.startswith("retrieval"):
        queries, keys = s.T * s.H * 2 * s.d * size, 2 * s.n * s.d * size
        least = queries + keys + s.T * s.H * s.k * (SUM + INDEX)
        if name == "retrieval, forward":
            return Cost(least, 2.0 * s.T * s.H * 2 * s.n * s.d)
        return Cost(least + queries + keys, 2 * 2.0 * s.pairs * 2 * s.d)
    row, tokens = s.R * s.D * size, s.T * s.D * size
    if name == "row-wise AdamW":
        # Table, momentum (read and written) and gradient; a second moment per row, a step per expert.
        return Cost(rows * (5 * row + 2 * (s.R * SUM + 4) + INDEX), 15 * rows * s.R * s.D)
    product = 2.0 * s.pairs * s.D
    read = tokens + s.pairs * (INDEX + size) + rows * row
    if name == "experts, forward":
        return Cost(read + tokens, s.R * product)
    written = s.N * row if name == "experts, backward, dense" else rows * (row + INDEX)
    return Cost(read + 2 * tokens + s.pairs * size + written, 2 * s.R * product)


PHASES = ("forward", "backward", "step")


def layer(shape: Shape, phase: str, sparse: bool, distinct: float | None = None) -> Cost:
    """PEER's layer: inference, forward and backward, or these and the optimiser's step."""
    s = shape
    matrix = s.D * s.H * 2 * s.d
    projection = dense(s.T, s.D, s.H * 2 * s.d, s.size)
    total = projection + operation("retrieval, forward", s) + operation("experts, forward", s, distinct)
    if phase == "forward":
        return total
    experts = "experts, backward to the touched rows" if sparse else "experts, backward, dense"
    total = (
        total + projection.times(2) + operation("retrieval, backward", s) + operation(experts, s, distinct)
    )
    if phase == "backward":
        return total
    rest = matrix + 2 * s.n * s.d
    if sparse:
        return total + adamw(rest, s.size) + operation("row-wise AdamW", s, distinct)
    return total + adamw(rest + s.N * s.R * s.D, s.size)


def dense(tokens: int, inputs: int, outputs: int, size: int) -> Cost:
    """A product of tokens with a matrix."""
    return Cost(size * (tokens * (inputs + outputs) + inputs * outputs), 2.0 * tokens * inputs * outputs)


def feed_forward(tokens: int, dim: int, width: int, phase: str, size: int, copies: int = 1) -> Cost:
    """Two matrices per copy, of which a token uses as much as `width` neurons in all."""
    once = dense(tokens, dim, width, size).times(2)
    total = once if phase == "forward" else once.times(3)
    return total + adamw(2 * dim * width * copies, size) if phase == "step" else total


def adamw(numbers: int, size: int) -> Cost:
    """torch's: parameter, gradient and two moments read, all but the gradient written."""
    return Cost(7.0 * numbers * size, 15.0 * numbers)


def gathers(shape: Shape, phase: str) -> Cost:
    """What gathering rows into tensors [T, K, D] moves, for the plan alone: that is no layer's least."""
    s = shape
    gathered = s.pairs * s.R * s.D * s.size
    passes = 4 if phase == "forward" else 14
    of_step = adamw(s.N * s.R * s.D, s.size) if phase == "step" else Cost(0, 0)
    dense_gradient = Cost(0 if phase == "forward" else 2.0 * s.N * s.R * s.D * s.size, 0)
    return Cost(passes * gathered, 4 * s.R * s.pairs * s.D) + of_step + dense_gradient
