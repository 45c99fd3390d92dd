"""The kernels at standard shapes, the operations that they make up, and their table."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from million_experts.benchmarks.triton_traffic.accesses import (
    BANDWIDTH,
    CACHE,
    INDEX,
    PEAKS,
    SUM,
    Accesses,
    Gather,
    Kernel,
    Picks,
    Stream,
)
from million_experts.benchmarks.triton_traffic.by_tiles import (
    spread,
    table_parts_of_tiles,
    tile_dots,
    tile_mix,
    tile_table,
)
from million_experts.benchmarks.triton_traffic.by_token import (
    RowSums,
    dots,
    gradient_weights,
    mix,
    output_weights,
    table_parts,
    table_rows,
)
from million_experts.benchmarks.triton_traffic.others import (
    adamw,
    add_parts,
    convert,
    fill,
    pick,
    sort_pairs,
    sort_selections,
)
from million_experts.benchmarks.triton_traffic.retrieval import (
    Retrieval,
    key_parts,
    key_sum,
    query_grad,
    topk,
)
from million_experts.ops.reference import SCRATCH_BYTES


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


def experts_forward(T: int, K: int, D: int, size: int, table: Stream | Gather) -> Accesses:
    """What `expert_mlp` takes and gives. The pre-activations can be had again from what backward reads."""
    P = T * K
    inputs = [Stream("x", T * D * size), Stream("indices", P * INDEX), Stream("gates", P * size)]
    return [*inputs, table, Stream("y", T * D * size)]


def experts_backward(T: int, K: int, D: int, size: int, table: Stream | Gather, grad: Stream) -> Accesses:
    """The same of its backward pass."""
    gradients = [Stream("grad_y", T * D * size), Stream("grad_gates", T * K * size), grad]
    return [*experts_forward(T, K, D, size, table), *gradients]  # grad_x for y


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
    inputs = experts_forward(T, K, D, size, table)
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
    both = [*inputs, *experts_backward(T, K, D, size, table, grad)]
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
    inputs = experts_forward(T, K, D, size, table)
    yield _operation(shape, "**expert_mlp**", inputs, forward)
    both = [*inputs, *experts_backward(T, K, D, size, table, table)]
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
