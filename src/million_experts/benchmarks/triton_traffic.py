"""How many bytes the Triton kernels move, and how many must move: a model, as long as no GPU measures.

    python -m million_experts.benchmarks.triton_traffic

prints the table of `docs/kernels.md`. What a kernel loads and stores is written down here tensor by tensor;
`tests/ops/triton/test_triton_traffic.py` compares it with what the kernels do in Triton's interpreter.

Shapes: T tokens, K experts a token, P = T*K pairs, N experts of R rows of D numbers; retrieval as in
`ops.reference`. All sizes in bytes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

# H100 SXM: bytes a second from memory, and of the second cache.
BANDWIDTH = 3.35e12
CACHE = 50 * 10**6

INDEX, SUM = 8, 4  # int64 and float32
SECTOR = 32  # what a GPU's memory moves at least


@dataclass(frozen=True)
class Stream:
    """A tensor that is read or written from end to end, each number `times` times."""

    tensor: str
    bytes: float
    times: float = 1
    apart: bool = False  # all of the tensor lies between one time and the next; else they follow closely

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
        self._counts: dict[tuple[str, int], int] = {}

    def in_stretches(self, room: int) -> int:
        """Distinct rows, counted anew for each stretch of picks that has `room` of them."""

        def count() -> int:
            found, held = 0, set[int]()
            for row in self.rows.tolist():
                if row not in held:
                    if len(held) == room:
                        held.clear()
                    held.add(row)
                    found += 1
            return found

        return self._remembered("stretches", room, count)

    def misses(self, room: int) -> int:
        """Rows that a cache of `room` rows lacks when they are read; it drops the one used longest ago."""

        def count() -> int:
            missed, held = 0, OrderedDict[int, None]()
            for row in self.rows.tolist():
                if row in held:
                    held.move_to_end(row)
                    continue
                missed += 1
                held[row] = None
                if len(held) > room:
                    held.popitem(last=False)
            return missed

        return self._remembered("misses", room, count)

    def _remembered(self, what: str, room: int, count: Callable[[], int]) -> int:
        if self.distinct <= room:
            return self.distinct
        if (what, room) not in self._counts:
            self._counts[what, room] = count()
        return self._counts[what, room]


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

    def moved(self, cache: float) -> float:
        return self.picks.misses(max(1, int(cache // self.row_bytes))) * self.row_bytes


Accesses = list[Stream | Gather]


def _split(width: int, block: int) -> int:
    return -(-width // block)


# --- the experts, token by token ----------------------------------------------------------------------------


def dots(picks: Picks, T: int, D: int, slots: int, x: int, table: int, block_k: int) -> Accesses:
    """`dots_kernel`: T tokens of `x` bytes a number with `slots` rows, 1 or 2, of the experts picked."""
    K = len(picks.rows) // T
    return [
        Stream("source", T * D * x, _split(K, block_k)),
        Stream("indices", T * K * INDEX),
        Gather("table", picks, slots * D * table),
        Stream("out", slots * T * K * SUM),
    ]


def mix(picks: Picks, T: int, D: int, slots: int, table: int, out: int, block_d: int) -> Accesses:
    """`mix_kernel`: sums of `slots` rows of the experts that T tokens picked."""
    K, chunks = len(picks.rows) // T, _split(D, block_d)
    weights = [Stream(name, T * K * SUM, chunks) for name in ("weights", "second_weights")[:slots]]
    return [
        *weights,
        Stream("indices", T * K * INDEX, chunks),
        Gather("table", picks, slots * D * table),
        Stream("out", T * D * out),
    ]


def output_weights(P: int, R: int, gates: int) -> Accesses:
    """`output_weights_kernel`."""
    return [Stream("pre", (R - 1) * P * SUM), Stream("gates", P * gates), Stream("weights", P * SUM)]


def gradient_weights(P: int, R: int, gates: int) -> Accesses:
    """`gradient_weights_kernel`."""
    return [
        Stream("upward", P * SUM),
        Stream("pre", (R - 1) * P * SUM),
        Stream("gates", P * gates),
        Stream("grad_gates", P * gates),
        Stream("weights", R * P * SUM),
    ]


@dataclass(frozen=True)
class RowSums:
    """The table's gradient from pairs sorted by expert; those with more than `length` are summed in parts."""

    tokens: np.ndarray  # [P]: of the sorted pairs
    counts: np.ndarray  # [M]: pairs of each expert
    D: int
    R: int
    x: int
    block_d: int
    length: int

    @classmethod
    def of(cls, picks: np.ndarray, N: int, **sizes: int) -> "RowSums":
        """For picks [T, K] of N experts, with the other fields as `sizes`."""
        flat = picks.ravel()
        tokens = np.argsort(flat, kind="stable") // picks.shape[1]
        return cls(tokens, np.bincount(flat, minlength=N), **sizes)

    @property
    def chunks(self) -> int:
        return _split(self.D, self.block_d)

    @property
    def most(self) -> int:
        """Parts that there may be: none where a part holds all pairs."""
        return 2 * len(self.tokens) // self.length if self.length < len(self.tokens) else 0

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
        tokens = Picks(self.tokens[np.repeat(self.in_parts == of_parts, self.counts)])
        pairs = len(tokens.rows)
        return [
            Gather("x", tokens, self.D * self.x),
            Gather("grad_y", tokens, self.D * self.x),
            Stream("weights", self.R * pairs * SUM, self.chunks),
            Stream("order", pairs * INDEX, self.chunks),
        ]


def _some(tensor: str, bytes_: float, issued: float) -> Stream:
    """Some numbers of a small tensor, which are read again and again."""
    return Stream(tensor, min(bytes_, issued), max(1.0, issued / bytes_))


def table_parts(s: RowSums) -> Accesses:
    """`table_parts_kernel`."""
    size = (len(s.counts) + 1) * INDEX
    return [
        *s.sums(of_parts=True),
        _some("starts", size, 2 * s.parts * s.chunks * INDEX),
        _some("part_starts", size, (s.most + s.parts) * s.chunks * INDEX),
        _some("owners", s.most * INDEX, s.parts * s.chunks * INDEX),
        Stream("parts", s.parts * s.R * s.D * SUM),
    ]


def table_rows(s: RowSums, out: int) -> Accesses:
    """`table_rows_kernel`, with a gradient of `out` bytes a number."""
    M = len(s.counts)
    starts, part_starts = (
        Stream(name, (M + 1) * INDEX, 2 * M * s.chunks / (M + 1)) for name in ("starts", "part_starts")
    )
    accesses = [*s.sums(of_parts=False), starts, Stream("values", M * s.R * s.D * out)]
    if s.most:
        accesses.append(part_starts)
    if s.parts:
        accesses.append(Stream("parts", s.parts * s.R * s.D * SUM))
    return accesses


# --- the experts, in tiles ----------------------------------------------------------------------------------


def tile_dots(T: int, N: int, D: int, x: int, table: int, tile: int) -> Accesses:
    """`tile_dots_kernel`: a row of all N experts."""
    return [
        Stream("source", T * D * x, _split(N, tile)),
        Stream("table", N * D * table, _split(T, tile), apart=True),
        Stream("dense", T * N * SUM),
    ]


def spread(picks: np.ndarray, N: int, chunk: int) -> Accesses:
    """`spread_kernel` for picks [T, K]. Memory takes a sector, 8 numbers, where one of them is written."""
    T, K = picks.shape
    chunks = _split(K, chunk)
    sectors = len(np.unique((np.arange(T)[:, None] * N + picks) // 8)) * SECTOR
    return [
        Stream("indices", T * K * INDEX, 1 + chunks),
        Stream("weights", T * K * SUM, chunks),
        Stream("dense", sectors, T * K * SUM / sectors),
    ]


def tile_mix(T: int, N: int, D: int, slots: int, table: int, out: int, tile: int) -> Accesses:
    """`tile_mix_kernel`: sums of `slots` rows of all N experts."""
    matrices = [Stream(name, T * N * SUM, _split(D, tile)) for name in ("dense", "second_dense")[:slots]]
    return [
        *matrices,
        Stream("table", slots * N * D * table, _split(T, tile), apart=True),
        Stream("out", T * D * out),
    ]


def tile_table(T: int, N: int, D: int, x: int, parts: int, tile: int) -> Accesses:
    """`tile_table_kernel`: a row of all N experts, in `parts` sums."""
    return [
        Stream("source", T * D * x, _split(N, tile), apart=True),
        Stream("dense", T * N * SUM, _split(D, tile)),
        Stream("parts", parts * N * D * SUM),
    ]


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


def topk(s: Retrieval, block_q: int, block_n: int, whole: bool) -> Accesses:
    """`topk_kernel`; `whole`: a query half is kept while it meets the sub-keys."""
    programs = _split(s.T * s.H, block_q)
    rounds = (_split(s.n1, block_n) + _split(s.n2, block_n)) / 2
    return [
        Stream("query", s.queries, 1 if whole else rounds),
        Stream("keys1", s.n1 * s.d * s.keys, programs, apart=True),
        Stream("keys2", s.n2 * s.d * s.keys, programs, apart=True),
        Stream("scores", s.selections * SUM),
        Stream("indices", s.selections * INDEX),
    ]


def query_grad(s: Retrieval, indices: np.ndarray, grads: int, block_d: int) -> Accesses:
    """`query_grad_kernel` for winners `indices` [T, H, k]."""
    chunks = _split(s.d, block_d)
    return [
        Stream("grad_scores", s.selections * grads, chunks),
        Stream("indices", s.selections * INDEX, chunks),
        Gather("keys1", Picks(indices // s.n2), s.d * s.keys),
        Gather("keys2", Picks(indices % s.n2), s.d * s.keys),
        Stream("grad_query", s.queries),
    ]


def key_parts(
    s: Retrieval, order: np.ndarray, counts: np.ndarray, grads: int, part: int, block_d: int
) -> Accesses:
    """`key_parts_kernel` for selections in sorted `order`, `counts` of them of each sub-key."""
    chunks, used = _split(s.d, block_d), int(np.sum(-(-counts // part)))
    most = len(order) // part + min(len(counts), len(order))
    return [
        Stream("grad_scores", s.selections * grads, 2 * chunks),
        Gather("query", Picks(order // s.k), s.d * s.query),
        Stream("order", len(order) * INDEX, chunks),
        Stream("starts", (len(counts) + 1) * INDEX, 2 * used * chunks / (len(counts) + 1)),
        Stream("part_starts", (len(counts) + 1) * INDEX, used * chunks / (len(counts) + 1)),
        Stream("owners", most * INDEX, chunks),
        Stream("parts", used * s.d * SUM),
    ]


def key_sum(s: Retrieval, counts: np.ndarray, part: int, block_d: int) -> Accesses:
    """`key_sum_kernel`."""
    chunks, used, M = _split(s.d, block_d), int(np.sum(-(-counts // part))), len(counts)
    return [
        Stream("parts", used * s.d * SUM),
        Stream("part_starts", (M + 1) * INDEX, 2 * M * chunks / (M + 1)),
        Stream("grad_keys1", s.n1 * s.d * s.keys),
        Stream("grad_keys2", s.n2 * s.d * s.keys),
    ]


# --- the optimiser ------------------------------------------------------------------------------------------


def adamw(
    n: int, R: int, D: int, steps: int, table: int, momentum: int, values: int, by_row: bool
) -> Accesses:
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
    return [
        *state,  # read
        *state,  # written
        Stream("rows", n * INDEX),
        Stream("history", steps * 3 * 8, n * 6 / (steps * 3)),
        Stream("values", n * width * values),
    ]


# --- standard shapes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One kernel at one shape, in bytes."""

    shape: str
    kernel: str
    issued: float  # without any cache: every pair's rows
    necessary: float  # each distinct row once for each stretch of picks that fills the cache
    moved: float  # what passes between memory and the cache

    @property
    def seconds(self) -> float:
        """At least, on an H100."""
        return self.moved / BANDWIDTH


def _row(shape: str, kernel: str, accesses: Iterable[Stream | Gather]) -> Row:
    accesses = list(accesses)
    return Row(
        shape,
        kernel,
        sum(a.issued for a in accesses),
        sum(a.necessary(CACHE) for a in accesses),
        sum(a.moved(CACHE) for a in accesses),
    )


def _by_token(
    shape: str, T: int, K: int, N: int, D: int, R: int, size: int, skewed: bool = False
) -> Iterable[Row]:
    """x, gates and table in `size` bytes a number; experts drawn uniformly, which shares them least.

    `skewed`: expert n is drawn in proportion to 1/n, so that some have many pairs.
    """
    generator = np.random.default_rng(0)
    if skewed:
        shares = 1 / np.arange(1, N + 1)
        drawn = generator.choice(N, (T, K), p=shares / shares.sum())
    else:
        drawn = generator.integers(0, N, (T, K))
    picks = Picks(drawn)
    yield _row(shape, "dots, forward", dots(picks, T, D, R - 1, size, size, 4))
    yield _row(shape, "output_weights", output_weights(T * K, R, size))
    yield _row(shape, "mix, forward", mix(picks, T, D, 1, size, size, 256))
    if T == 1:
        return
    yield _row(shape, "dots, backward", dots(picks, T, D, 1, size, size, 4))
    yield _row(shape, "gradient_weights", gradient_weights(T * K, R, size))
    yield _row(shape, "mix, backward", mix(picks, T, D, R - 1, size, size, 256))
    dense = RowSums.of(drawn, N, D=D, R=R, x=size, block_d=256, length=256)
    touched = replace(dense, counts=dense.counts[dense.counts > 0])
    if dense.parts:
        yield _row(shape, "table_parts", table_parts(touched))
    yield _row(shape, "table_rows, (rows, values)", table_rows(touched, size))
    yield _row(shape, "table_rows, dense", table_rows(dense, size))
    yield _row(shape, "adamw", adamw(picks.distinct, R, D, 100, size, size, size, size < 4))


def _by_tiles(shape: str, T: int, K: int, N: int, D: int, size: int) -> Iterable[Row]:
    drawn = np.random.default_rng(0).integers(0, N, (T, K))
    yield _row(shape, "tile_dots, for a row", tile_dots(T, N, D, size, size, 64))
    yield _row(shape, "spread", spread(drawn, N, 32))
    yield _row(shape, "tile_mix, for a row", tile_mix(T, N, D, 1, size, size, 64))
    yield _row(shape, "tile_table, for a row", tile_table(T, N, D, size, 2, 64))


def _retrieval(shape: str, s: Retrieval) -> Iterable[Row]:
    indices = np.random.default_rng(0).integers(0, s.n1 * s.n2, (s.T, s.H, s.k))
    yield _row(shape, "topk", topk(s, 32, 64, s.d <= 128))
    if s.T == 1:
        return
    yield _row(shape, "query_grad", query_grad(s, indices, SUM, 64))
    picks = np.stack([indices // s.n2, s.n1 + indices % s.n2], 2).ravel()
    counts = np.bincount(picks, minlength=s.n1 + s.n2)
    order = np.argsort(picks, kind="stable")
    yield _row(shape, "key_parts", key_parts(s, order, counts, SUM, 512, 64))
    yield _row(shape, "key_sum", key_sum(s, counts, 512, 64))


def standard() -> list[Row]:
    """The kernels at the shapes of `docs/kernels.md`."""
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


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count >= 1e6 else f"{count / 1e6:.3f}"


def table() -> str:
    """`standard` in Markdown."""
    lines, shape = [], ""
    for row in standard():
        if row.shape != shape:
            shape = row.shape
            lines += [
                "", f"**{shape}**", "",
                "| kernel | every pair, MB | must move, MB | moves, MB | ratio | H100, µs at least |",
                "|---|---|---|---|---|---|",
            ]  # fmt: skip
        cells = [_megabytes(n) for n in (row.issued, row.necessary, row.moved)]
        time = f"{row.seconds * 1e6:,.1f}" if row.seconds > 1e-7 else "0.1"
        lines.append(f"| {row.kernel} | {' | '.join(cells)} | {row.moved / row.necessary:.2f} | {time} |")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    print(table())
