"""How many bytes the Triton kernels move, and how many must move: a model, as long as no GPU measures.

    python -m million_experts.benchmarks.triton_traffic

prints the table of `docs/kernels.md`. What a kernel loads and stores is written down here tensor by tensor;
`tests/ops/triton/test_triton_traffic.py` compares it with what the kernels do in Triton's interpreter. Sizes
of blocks are the kernels' own; of configurations that are tried out, the first.

Shapes: T tokens, K experts a token, P = T*K pairs, N experts of R rows of D numbers; retrieval as in
`ops.reference`. All sizes in bytes.
"""

import functools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from million_experts.ops import triton_expert_rows as by_rows
from million_experts.ops import triton_expert_tiles as by_tiles
from million_experts.ops import triton_retrieval as retrieval
from million_experts.ops.reference import SCRATCH_BYTES

# H100 SXM: bytes a second from memory, and of the second cache.
BANDWIDTH = 3.35e12
CACHE = 50 * 10**6

# Operations a second, a fused multiply-add being two, without sparsity. A float32 instruction that is no such
# pair counts as two as well. There are half as many integer units as float32 ones, and they fuse nothing.
PEAKS = {"float32": 67e12, "tf32": 494.7e12, "narrow": 989.4e12, "integer": 67e12 / 4}

# Programs that run at a time, taking turns: 132 processors with 16 each.
IN_FLIGHT = 132 * 16

INDEX, SUM = 8, 4  # int64 and float32
SECTOR = 32  # what a GPU's memory moves at least


@dataclass(frozen=True)
class Stream:
    """A tensor that is read or written from end to end, each number `times` times."""

    tensor: str
    bytes: float
    times: float = 1
    apart: bool = False  # all of the tensor lies between one time and the next; else they follow closely
    past: bool = False  # written with the hint that nobody will read it soon, so that it takes no room

    @property
    def issued(self) -> float:
        return self.bytes * self.times

    def necessary(self, cache: float) -> float:
        return self.bytes

    def moved(self, cache: float) -> float:
        return self.issued if self.apart and self.bytes > cache else self.bytes


class Picks:
    """Numbers of rows in the order in which they are read."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows.ravel()
        self.distinct = len(np.unique(self.rows))
        self._stretches: dict[int, int] = {}

    def in_stretches(self, room: int) -> int:
        """Distinct rows, counted anew for each stretch of picks that has `room` of them."""
        if self.distinct <= room:
            return self.distinct
        if room not in self._stretches:
            found, held = 0, set[int]()
            for row in self.rows.tolist():
                if row not in held:
                    if len(held) == room:
                        held.clear()
                    held.add(row)
                    found += 1
            self._stretches[room] = found
        return self._stretches[room]

    def in_turns(self, each: int, in_flight: int) -> np.ndarray:
        """The rows as programs read them that have `each` picks, `in_flight` of them taking turns."""
        programs = _up(_split(len(self.rows), each), in_flight)
        rows = np.full(programs * each, -1)
        rows[: len(self.rows)] = self.rows
        rows = rows.reshape(-1, in_flight, each).swapaxes(1, 2).ravel()
        return rows[rows >= 0]


@dataclass(frozen=True)
class Gather:
    """Rows of a tensor that are read as they were picked."""

    tensor: str
    picks: Picks
    row_bytes: int

    @property
    def issued(self) -> float:
        return len(self.picks.rows) * self.row_bytes

    def necessary(self, cache: float) -> float:
        return self.picks.in_stretches(max(1, int(cache // self.row_bytes))) * self.row_bytes


@dataclass(frozen=True)
class Numbers:
    """Single numbers of a tensor at scattered places, all of them: each comes in a sector."""

    tensor: str
    picks: Picks  # of sectors, or of as many sectors side by side as `row_bytes` has
    row_bytes: int
    bytes: float
    times: float  # that each is read

    @property
    def issued(self) -> float:
        return self.bytes * self.times

    def necessary(self, cache: float) -> float:
        return self.bytes


Accesses = list[Stream | Gather | Numbers]


@dataclass(frozen=True)
class Kernel:
    """What a launch loads, stores and computes."""

    accesses: Accesses
    work: dict[str, float]  # operations, by their kind in PEAKS
    each: int = 1  # picks of a program
    products: float = 0  # operations of products of matrices, before any is computed in three

    @property
    def issued(self) -> float:
        return sum(a.issued for a in self.accesses)

    def necessary(self, cache: float) -> float:
        return sum(a.necessary(cache) for a in self.accesses)

    def moved(self, cache: float, in_flight: int = IN_FLIGHT) -> float:
        """What passes between memory and a cache that drops what was used longest ago.

        All tensors share the cache: those that are streamed push picked rows out of it.
        """
        rows: dict[Picks, int] = {}  # bytes of all rows that are picked together
        streamed = past = 0.0
        for access in self.accesses:
            if isinstance(access, Stream) and access.past:
                past += access.moved(cache)
            elif isinstance(access, Stream):
                streamed += access.moved(cache)
            else:
                rows[access.picks] = rows.get(access.picks, 0) + access.row_bytes
        distinct = sum(picks.distinct * size for picks, size in rows.items())
        if streamed + distinct <= cache or distinct == 0:
            return past + streamed + distinct
        turns = [picks.in_turns(self.each, in_flight) for picks in rows]
        return past + streamed + _missed(turns, list(rows.values()), streamed / len(turns[0]), cache)

    @property
    def computing(self) -> float:
        """Seconds on an H100, at least; kinds of units work side by side."""
        return max((count / PEAKS[kind] for kind, count in self.work.items()), default=0.0)


def _missed(picks: list[np.ndarray], sizes: list[int], passing: float, cache: float) -> float:
    """Bytes of rows that the cache lacks when they are read, `passing` other bytes going by at each pick."""
    keys = [(rows * len(picks) + tensor).tolist() for tensor, rows in enumerate(picks)]
    missed, used, held = 0.0, 0.0, OrderedDict[int, float]()
    for at, row in enumerate(zip(*keys, strict=True), 1):
        for key, size in zip(row, sizes, strict=True):
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = size
                missed += size
                used += size
        held[-at] = passing
        used += passing
        while used > cache:
            used -= held.popitem(last=False)[1]
    return missed


def _split(width: int, block: int) -> int:
    return -(-width // block)


def _up(width: int, block: int) -> int:
    """The next multiple of a block: padding is computed like the rest."""
    return _split(width, block) * block


# --- the experts, token by token ----------------------------------------------------------------------------


def dots(picks: Picks, T: int, D: int, slots: int, x: int, table: int) -> Kernel:
    """`dots_kernel`: T tokens of `x` bytes a number with `slots` rows, 1 or 2, of the experts picked."""
    K, block_k = len(picks.rows) // T, by_rows.DOTS_CONFIGS[0].kwargs["ROWS"] // slots
    accesses: Accesses = [
        Stream("source", T * D * x, _split(K, block_k)),
        Stream("indices", T * K * INDEX),
        Gather("table", picks, slots * D * table),
        Stream("out", slots * T * K * SUM),
    ]
    products = slots * T * _up(K, block_k) * _up(D, by_rows.DOTS_COLUMNS)
    return Kernel(accesses, {"float32": 2 * products}, min(K, block_k))


def mix(picks: Picks, T: int, D: int, slots: int, table: int, out: int) -> Kernel:
    """`mix_kernel`: sums of `slots` rows of the experts that T tokens picked."""
    config = by_rows.MIX_CONFIGS[0].kwargs
    K, chunks = len(picks.rows) // T, _split(D, config["BLOCK_D"])
    weights = [Stream(name, T * K * SUM, chunks) for name in ("weights", "second_weights")[:slots]]
    accesses: Accesses = [
        *weights,
        Stream("indices", T * K * INDEX, chunks),
        Gather("table", picks, slots * D * table),
        Stream("out", T * D * out),
    ]
    products = slots * T * _up(K, config["UNROLL"]) * chunks * config["BLOCK_D"]
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
        return _split(self.D, by_rows.TABLE_CONFIGS[0].kwargs["BLOCK_D"])

    @property
    def most(self) -> int:
        """Parts that there may be: none where a part holds all pairs."""
        return 2 * len(self.order) // self.length if self.length < len(self.order) else 0

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


# --- the experts, in tiles ----------------------------------------------------------------------------------


def _tensor_cores(accesses: Accesses, T: int, N: int, D: int, exact: bool) -> Kernel:
    """A product of matrices of these padded sizes; `exact`: as they are, else float32, in three of tf32."""
    products = 2 * T * N * D
    return Kernel(accesses, {"narrow": products} if exact else {"tf32": 3 * products}, products=products)


def tile_dots(T: int, N: int, D: int, x: int, table: int) -> Kernel:
    """`tile_dots_kernel`: a row of all N experts."""
    tile_t, tile_n = by_tiles.TILE_TOKENS, by_tiles.TILE_EXPERTS
    accesses: Accesses = [
        Stream("source", T * D * x, _split(N, tile_n)),
        Stream("table", N * D * table, _split(T, tile_t), apart=True),
        Stream("dense", T * N * SUM),
    ]
    padded = _up(T, tile_t), _up(N, tile_n), _up(D, by_tiles.DEPTH)
    return _tensor_cores(accesses, *padded, exact=x == table == 2)


def _sectors(picks: np.ndarray, N: int) -> int:
    """Bytes of the sectors of a float32 matrix [T, N] in which the picks [T, K] lie."""
    T = len(picks)
    return len(np.unique((np.arange(T)[:, None] * N + picks) * SUM // SECTOR)) * SECTOR


def spread(picks: np.ndarray, N: int) -> Kernel:
    """`spread_kernel` for picks [T, K]. Memory takes a sector, 8 numbers, where one of them is written."""
    T, K = picks.shape
    chunks, sectors = _split(K, by_tiles.SPREAD), _sectors(picks, N)
    accesses: Accesses = [
        Stream("indices", T * K * INDEX, 1 + chunks),
        Stream("weights", T * K * SUM, chunks),
        Stream("dense", sectors, T * K * SUM / sectors),
    ]
    # All picks of a token meet all: compare, which takes two integer instructions, select, add.
    pairs = T * (chunks * by_tiles.SPREAD) ** 2
    return Kernel(accesses, {"integer": 2 * pairs, "float32": 2 * 2 * pairs})


def tile_mix(T: int, N: int, D: int, slots: int, table: int, out: int) -> Kernel:
    """`tile_mix_kernel`: sums of `slots` rows of all N experts."""
    tile_t, tile_d = by_tiles.TILE_TOKENS, by_tiles.TILE_COLUMNS
    matrices = [Stream(name, T * N * SUM, _split(D, tile_d)) for name in ("dense", "second_dense")[:slots]]
    accesses: Accesses = [
        *matrices,
        Stream("table", slots * N * D * table, _split(T, tile_t), apart=True),
        Stream("out", T * D * out),
    ]
    padded = _up(T, tile_t), slots * _up(N, by_tiles.DEPTH), _up(D, tile_d)
    return _tensor_cores(accesses, *padded, exact=False)


def table_parts_of_tiles(T: int, N: int, D: int) -> int:
    """Sums in which `ByTiles.table_gradient` splits the tokens."""
    return _split(T, by_tiles.tokens_of_a_part(T, N, D))


def tile_table(T: int, N: int, D: int, x: int) -> Kernel:
    """`tile_table_kernel`: a row of all N experts."""
    tile_n, tile_d, parts = by_tiles.TILE_EXPERTS, by_tiles.TILE_COLUMNS, table_parts_of_tiles(T, N, D)
    accesses: Accesses = [
        Stream("source", T * D * x, _split(N, tile_n), apart=True),
        Stream("dense", T * N * SUM, _split(D, tile_d)),
        Stream("parts", parts * N * D * SUM),
    ]
    padded = _up(T, by_tiles.DEPTH), _up(N, tile_n), _up(D, tile_d)
    return _tensor_cores(accesses, *padded, exact=False)


# --- retrieval ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrieval:
    """Sizes of the retrieval kernels, with one pair of codebooks for all heads."""

    T: int
    H: int
    k: int
    n1: int
    n2: int
    d: int
    query: int
    keys: int

    @property
    def selections(self) -> int:
        return self.T * self.H * self.k

    @property
    def queries(self) -> int:
        return self.T * self.H * 2 * self.d * self.query


def _sorting(block: int, k: int) -> int:
    """Numbers times steps to merge a block of sub-keys into the best k: `_merge`, and `tl.topk` within."""
    log = k.bit_length() - 1
    steps = block * log * (log + 1) // 2 + k * (1 + log)
    while block > k:
        block //= 2
        steps += block * (1 + log)
    return steps


def topk(s: Retrieval) -> Kernel:
    """`topk_kernel`."""
    k = 1 << max(1, (s.k - 1).bit_length())
    wide = s.query != s.keys or s.query == SUM
    whole, block_n, block_d = retrieval.blocks(s.d, k, wide)
    programs = _split(s.T * s.H, retrieval.BLOCK_Q)
    rounds = _split(s.n1, block_n) + _split(s.n2, block_n)
    accesses: Accesses = [
        Stream("query", s.queries, 1 if whole else rounds / 2),
        Stream("keys1", s.n1 * s.d * s.keys, programs, apart=True),
        Stream("keys2", s.n2 * s.d * s.keys, programs, apart=True),
        Stream("scores", s.selections * SUM),
        Stream("indices", s.selections * INDEX),
    ]
    queries = programs * retrieval.BLOCK_Q
    products = 2 * queries * rounds * block_n * _up(s.d, block_d)
    # 64 bits in units of 32: two instructions to compare, two to select.
    sorting = 4 * queries * rounds * _sorting(block_n, k)
    work = {"float32" if wide else "narrow": products, "integer": sorting}
    return Kernel(accesses, work, products=products)


def query_grad(s: Retrieval, indices: np.ndarray, grads: int) -> Kernel:
    """`query_grad_kernel` for winners `indices` [T, H, k]."""
    block_q, block_d = retrieval.GRAD_QUERIES, retrieval._columns(s.d, retrieval.GRAD_COLUMNS)
    chunks = _split(s.d, block_d)
    accesses: Accesses = [
        Stream("grad_scores", s.selections * grads, chunks),
        Stream("indices", s.selections * INDEX, chunks),
        Gather("keys1", Picks(indices // s.n2), s.d * s.keys),
        Gather("keys2", Picks(indices % s.n2), s.d * s.keys),
        Stream("grad_query", s.queries),
    ]
    products = 2 * _up(s.T * s.H, block_q) * s.k * chunks * block_d
    return Kernel(accesses, {"float32": 2 * products}, block_q * s.k)


def key_parts(s: Retrieval, order: np.ndarray, counts: np.ndarray, grads: int) -> Kernel:
    """`key_parts_kernel` for selections in sorted `order`, `counts` of them of each sub-key."""
    part, block_p = retrieval.PART, retrieval.GRAD_SELECTIONS
    block_d = retrieval._columns(s.d, retrieval.GRAD_COLUMNS)
    chunks, used = _split(s.d, block_d), int(np.sum(-(-counts // part)))
    most = len(order) // part + min(len(counts), len(order))
    scores = order // (2 * s.k) * s.k + order % s.k
    accesses: Accesses = [
        Numbers("grad_scores", Picks(scores * grads // SECTOR), SECTOR, s.selections * grads, 2 * chunks),
        Gather("query", Picks(order // s.k), s.d * s.query),
        Stream("order", len(order) * INDEX, chunks),
        Stream("starts", (len(counts) + 1) * INDEX, 2 * used * chunks / (len(counts) + 1)),
        Stream("part_starts", (len(counts) + 1) * INDEX, used * chunks / (len(counts) + 1)),
        Stream("owners", most * INDEX, chunks),
        Stream("parts", used * s.d * SUM),
    ]
    products = float(np.sum(-(-counts // block_p))) * block_p * chunks * block_d
    return Kernel(accesses, {"float32": 2 * products}, part)


def key_sum(s: Retrieval, counts: np.ndarray) -> Kernel:
    """`key_sum_kernel`."""
    block_d, M = retrieval._columns(s.d, retrieval.GRAD_COLUMNS), len(counts)
    chunks, used = _split(s.d, block_d), int(np.sum(-(-counts // retrieval.PART)))
    accesses: Accesses = [
        Stream("parts", used * s.d * SUM),
        Stream("part_starts", (M + 1) * INDEX, 2 * M * chunks / (M + 1)),
        Stream("grad_keys1", s.n1 * s.d * s.keys),
        Stream("grad_keys2", s.n2 * s.d * s.keys),
    ]
    return Kernel(accesses, {"float32": 2 * used * chunks * block_d})


# --- the optimiser ------------------------------------------------------------------------------------------


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


# --- what PyTorch does between the kernels ------------------------------------------------------------------


def fill(bytes_: float) -> Kernel:
    """Zeros, or any other tensor that is written from end to end."""
    return Kernel([Stream("out", bytes_)], {})


def pick(picks: np.ndarray, N: int) -> Kernel:
    """`torch.gather` of float32 [T, N] at picks [T, K]."""
    P = picks.size
    return Kernel(
        [Stream("dense", _sectors(picks, N)), Stream("indices", P * INDEX), Stream("out", P * SUM)], {}
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


# --- standard shapes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One kernel or operation at one shape, in bytes."""

    shape: str
    kernel: str
    issued: float  # without any cache: every pair's rows
    necessary: float  # each distinct row once for each stretch of picks that fills the cache
    moved: float  # what passes between memory and the cache
    seconds: float  # at least, on an H100
    computing: float  # of these, in what arithmetic binds
    work: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.moved / self.necessary

    @property
    def bound(self) -> str:
        return "arithmetic" if self.computing > self.seconds / 2 else "memory"


def _row(shape: str, name: str, kernel: Kernel) -> Row:
    moved = kernel.moved(CACHE)
    seconds = max(moved / BANDWIDTH, kernel.computing)
    computing = seconds if kernel.computing == seconds else 0.0
    return Row(shape, name, kernel.issued, kernel.necessary(CACHE), moved, seconds, computing, kernel.work)


def _operation(shape: str, name: str, inputs_and_outputs: Accesses, rows: list[Row]) -> Row:
    """All launches and passes of an operation. Nothing stays in the cache from one to the next."""
    work: dict[str, float] = {}
    for row in rows:
        for kind, count in row.work.items():
            work[kind] = work.get(kind, 0) + count
    return Row(
        shape,
        name,
        sum(row.issued for row in rows),
        Kernel(inputs_and_outputs, {}).necessary(CACHE),
        sum(row.moved for row in rows),
        sum(row.seconds for row in rows),
        sum(row.computing for row in rows),
        work,
    )


def _forward(T: int, K: int, D: int, size: int, table: Stream | Gather) -> Accesses:
    """What `expert_mlp` takes and gives. The pre-activations can be had again from what backward reads."""
    P = T * K
    inputs = [Stream("x", T * D * size), Stream("indices", P * INDEX), Stream("gates", P * size)]
    return [*inputs, table, Stream("y", T * D * size)]


def _backward(T: int, K: int, D: int, size: int, table: Stream | Gather, grad: Stream) -> Accesses:
    """The same of its backward pass."""
    gradients = [Stream("grad_y", T * D * size), Stream("grad_gates", T * K * size), grad]
    return [*_forward(T, K, D, size, table), *gradients]  # grad_x for y


def _by_token(
    shape: str, T: int, K: int, N: int, D: int, R: int, size: int, skewed: bool = False
) -> Iterator[Row]:
    """x, gates and table in `size` bytes a number; experts drawn uniformly, which shares them least.

    `skewed`: expert n is drawn in proportion to 1/n, so that some have many pairs.
    """
    generator = np.random.default_rng(0)
    if skewed:
        shares = 1 / np.arange(1, N + 1)
        drawn = generator.choice(N, (T, K), p=shares / shares.sum())
    else:
        drawn = generator.integers(0, N, (T, K))
    picks, row = Picks(drawn), functools.partial(_row, shape)
    forward = [
        row("dots, forward", dots(picks, T, D, R - 1, size, size)),
        row("output_weights", output_weights(T * K, R, size)),
        row("mix, forward", mix(picks, T, D, 1, size, size)),
    ]
    yield from forward
    table = Gather("table", picks, R * D * size)
    inputs = _forward(T, K, D, size, table)
    if T == 1:
        yield _operation(shape, "**expert_mlp**", inputs, forward)
        return
    dense = RowSums.of(drawn, N, D, R, size)
    touched = replace(dense, counts=dense.counts[dense.counts > 0])
    backward = [
        row("dots, backward", dots(picks, T, D, 1, size, size)),
        row("gradient_weights", gradient_weights(T * K, R, size)),
        row("mix, backward", mix(picks, T, D, R - 1, size, size)),
        row("PyTorch: sort", sort_pairs(T * K, picks.distinct)),
        *([row("table_parts", table_parts(touched))] if dense.parts else []),
        row("table_rows, (rows, values)", table_rows(touched, size)),
    ]
    yield from backward
    yield row("table_rows, dense", table_rows(dense, size))
    yield row("adamw", adamw(picks.distinct, R, D, 100, size, size, size, size < 4))
    grad = Stream("rows, values", picks.distinct * (INDEX + R * D * size))
    yield _operation(shape, "**expert_mlp**", inputs, forward)
    both = [*inputs, *_backward(T, K, D, size, table, grad)]
    yield _operation(shape, "**expert_mlp and backward, (rows, values)**", both, [*forward, *backward])


def _by_tiles(shape: str, T: int, K: int, N: int, D: int, size: int) -> Iterator[Row]:
    """Experts of two rows."""
    assert T * N * SUM <= SCRATCH_BYTES, "all tokens at a time"
    R, drawn = 2, np.random.default_rng(0).integers(0, N, (T, K))
    row = functools.partial(_row, shape)
    dots_row = [
        row("tile_dots, for a row", tile_dots(T, N, D, size, size)),
        row("PyTorch: gather", pick(drawn, N)),
    ]
    spread_rows = [
        row("PyTorch: zeros [T, N]", fill(T * N * SUM)),
        row("spread", spread(drawn, N)),
    ]
    mix_row = row("tile_mix, for a row", tile_mix(T, N, D, 1, size, size))
    weights = row("output_weights", output_weights(T * K, R, size))
    forward = [*dots_row, weights, *spread_rows, mix_row]
    yield from forward
    slopes = row("gradient_weights", gradient_weights(T * K, R, size))
    table_row = [
        row("tile_table, for a row", tile_table(T, N, D, size)),
        row("PyTorch: sum of parts, for a row", add_parts(table_parts_of_tiles(T, N, D), N, D)),
    ]
    ends = [
        row("PyTorch: zeros [N, R, D]", fill(N * R * D * SUM)),
        row("PyTorch: to the table's type", convert(N * R * D, size)),
    ]
    yield from (slopes, *table_row, *ends)
    backward = [*dots_row, slopes, *spread_rows, mix_row, *R * [*spread_rows, *table_row], *ends]
    table = Stream("table", N * R * D * size)
    inputs = _forward(T, K, D, size, table)
    yield _operation(shape, "**expert_mlp**", inputs, forward)
    both = [*inputs, *_backward(T, K, D, size, table, table)]
    yield _operation(shape, "**expert_mlp and backward**", both, [*forward, *backward])


def _retrieval(shape: str, s: Retrieval) -> Iterator[Row]:
    indices = np.random.default_rng(0).integers(0, s.n1 * s.n2, (s.T, s.H, s.k))
    row, forward = functools.partial(_row, shape), topk(s)
    picks = np.stack([indices // s.n2, s.n1 + indices % s.n2], 2).ravel()
    counts, order = np.bincount(picks, minlength=s.n1 + s.n2), np.argsort(picks, kind="stable")
    rows = [
        row("topk", forward),
        row("query_grad", query_grad(s, indices, SUM)),
        row("PyTorch: sort", sort_selections(s.selections)),
        row("key_parts", key_parts(s, order, counts, SUM)),
        row("key_sum", key_sum(s, counts)),
    ]
    yield from rows
    winners = [Stream("grad_scores", s.selections * SUM), Stream("indices", s.selections * INDEX)]
    keys = Stream("keys, grad_keys", 2 * (s.n1 + s.n2) * s.d * s.keys)
    needed = [*forward.accesses, Stream("query, grad_query", 2 * s.queries), keys, *winners]
    yield _operation(shape, "**retrieval and backward**", needed, rows)


@functools.cache
def standard() -> list[Row]:
    """The kernels at the shapes of `docs/kernels.md`, and the operations that they make up."""
    million = 1024**2
    return [
        *_by_token("2,048 tokens, 128 of 1,048,576, D = 256, float32", 2048, 128, million, 256, 2, 4),
        *_by_token("8,192 tokens, 128 of 1,048,576, D = 1024, bfloat16", 8192, 128, million, 1024, 2, 2),
        *_by_token("1 token, 128 of 1,048,576, D = 1024, bfloat16", 1, 128, million, 1024, 2, 2),
        *_by_token("8,192 tokens, 128 of 1,048,576, expert n in proportion to 1/n, D = 256, bfloat16",
                   8192, 128, million, 256, 2, 2, skewed=True),
        *_by_tiles("8,192 tokens, 128 of 1,024, D = 1024, bfloat16", 8192, 128, 1024, 1024, 2),
        *_retrieval("2,048 tokens, 8 heads, 16 of 1024 x 1024, d = 64, float32",
                    Retrieval(2048, 8, 16, 1024, 1024, 64, 4, 4)),
        *_retrieval("8,192 tokens, 8 heads, 16 of 1024 x 1024, d = 128, bfloat16",
                    Retrieval(8192, 8, 16, 1024, 1024, 128, 2, 2)),
    ]  # fmt: skip


def _number(count: float) -> str:
    return f"{count:,.1f}" if count >= 1 else f"{count:.3f}"


def _work(work: dict[str, float]) -> str:
    """Thousand millions of operations of the kind that takes longest."""
    kind = max(work, key=lambda kind: work[kind] / PEAKS[kind], default=None)
    return "" if kind is None else f"{_number(work[kind] / 1e9)} {kind}"


COLUMNS = (
    "kernel", "every pair, MB", "must move, MB", "moves, MB", "ratio", "Gop", "H100, µs at least", "bound by",
)  # fmt: skip


def table() -> str:
    """`standard` in Markdown."""
    lines, shape = [], ""
    for row in standard():
        if row.shape != shape:
            shape = row.shape
            lines += [
                "", f"**{shape}**", "",
                f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|",
            ]  # fmt: skip
        cells = [
            row.kernel, *(_number(n / 1e6) for n in (row.issued, row.necessary, row.moved)),
            f"{row.ratio:.2f}", _work(row.work), _number(row.seconds * 1e6), row.bound,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    print(table())
