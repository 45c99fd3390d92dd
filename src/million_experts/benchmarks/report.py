"""Results on disk: one JSON row a measurement, and Markdown tables for readers."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from million_experts.benchmarks.cases import CASES, TARGET_CASES
from million_experts.benchmarks.machine import one_line
from million_experts.benchmarks.targets import Outcome, Row, evaluate
from million_experts.benchmarks.workload import PHASE_TITLES
from million_experts.lm.files import write_whole

BUSY = 0.15  # cores that others keep busy, above which times mean little
ROWS_FILE, TABLES_FILE = "results.jsonl", "results.md"
TARGETS = tuple(target for case in TARGET_CASES for target in case.targets)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, or of the file of that kind in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    file = path / ROWS_FILE if path.is_dir() or not path.suffix else path
    if not file.exists():
        raise FileNotFoundError(f"no results of a benchmark in {file}")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("case", "phase", "competitor", "status")} | row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"line {number} of {file} is no row of results: {error!r}") from error
    return rows


def merge(before: Iterable[Row], now: Sequence[Row]) -> list[Row]:
    """Rows with those of the cases that were measured anew replaced, in the order of the cases."""
    measured = {row["case"] for row in now}
    order = {case.name: place for place, case in enumerate(CASES)}
    rows = [row for row in before if row["case"] not in measured] + list(now)
    return sorted(rows, key=lambda row: order.get(row["case"], len(order)))


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """Writes both files, each whole."""
    write_whole(folder / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(folder / TABLES_FILE, markdown(rows, figures=sorted(p.name for p in folder.glob("*.png"))))


def outcomes(rows: Iterable[Row]) -> list[Outcome]:
    """What the targets whose cases were measured came to."""
    rows = list(rows)
    measured = {row["case"] for row in rows}
    return evaluate((target for target in TARGETS if target.case in measured), rows)


LEGEND = """\
N experts in the pool, H heads of k experts each, K = H*k experts a token, T tokens; float32, GELU, no GLU
unless said. A ratio is our median over that of the fastest competitor it names, in one process that gave
them turns. GB are 10^9 bytes.

- *million-experts*: `PEER` with the C++ kernels; *reference*: the same layer in plain PyTorch;
  *torch.compile*: a straightforward PEER layer of gathers and einsums, compiled.
- *PEER-pytorch*: the package, with softmax scores over all k experts and the same key size a half.
- *Mixtral*: the sparse block of transformers, 2 of 4 experts, eager or with `grouped_mm`.
- *dense*: two linear layers with GELU between them; its width is in `results.jsonl`, as are all shapes.
- *PKM*: a product-key memory, values instead of neurons, by `nn.EmbeddingBag`; it computes less than PEER.
- *Zipf picks*: expert n is picked with a probability in proportion to 1/n; *uniform picks*: all alike.
- *sparse*: `PEER(sparse_grad=True)` and `RowwiseAdamW`; *in backward*: with `fuse_into_backward`; *bfloat16*:
  table and momentum in bfloat16, one second moment a row. In the cases of training steps (S, steps) dense
  gradients go to torch's AdamW with `fused=True`, in all others to AdamW as it is by default."""


def markdown(rows: Sequence[Row], figures: Iterable[str] = ()) -> str:
    """Targets first, then every case."""
    parts = ["# Benchmark", _provenance(rows), LEGEND, "## Targets", _targets_table(outcomes(rows))]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    cases = dict.fromkeys(row["case"] for row in rows)
    parts.append("## Cases")
    parts.append(
        "Medians, in parentheses the quartiles; *n* is the number of repetitions. Memory is the peak above "
        "the start, which is the process with the weights built and nothing run."
    )
    for case in cases:
        own = [row for row in rows if row["case"] == case]
        parts += [f"### {case}: {own[0]['title']}", _case_table(own)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _provenance(rows: Sequence[Row]) -> str:
    """Where the rows come from; more than one line when they were not measured together."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        commit = (row.get("commit") or "no commit")[:12] + (" with changes" if row.get("dirty") else "")
        if "machine" in row:
            lines.setdefault(f"- {commit}, {one_line(row)}", []).append(row["case"])
    if len(lines) <= 1:
        return "".join(line.removeprefix("- ") for line in lines)
    return "\n".join(f"{line}: {', '.join(dict.fromkeys(cases))}" for line, cases in lines.items())


def _targets_table(found: Sequence[Outcome]) -> str:
    if not found:
        return "No case with a target was measured."
    lines = [
        "| target | ratio | between quartiles | bound | | over |",
        "|---|---:|---:|---:|---|---|",
    ]
    for outcome in found:
        target = outcome.target
        bound = target.bound_text
        title = f"{target.name}: {target.title}" if target.name not in target.title else target.title
        if outcome.ratio is None:
            lines.append(f"| {title} | — | — | {bound} | not measured | {_cell(outcome.reason)} |")
            continue
        spread = "—" if target.of_memory else f"{outcome.low:.3g} to {outcome.high:.3g}"
        met = "met" if outcome.met else "**not met**"
        ratio = target.show(outcome.ratio)
        lines.append(f"| {title} | {ratio} | {spread} | {bound} | {met} | {outcome.over or '—'} |")
    return "\n".join(lines)


def _case_table(rows: Sequence[Row]) -> str:
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    memory = any(row.get("peak_bytes") is not None for row in rows)
    head, rule = "| |", "|---|"
    for phase in phases:
        head += f" {PHASE_TITLES[phase]} | n |" + (" memory |" if memory else "")
        rule += "---:|---:|" + ("---:|" if memory else "")
    lines, notes = [head, rule], []
    for name in dict.fromkeys(row["competitor"] for row in rows):
        line = f"| {name} |"
        for row in (row for row in rows if row["competitor"] == name):
            if row["status"] != "measured":
                line += f" {row['status']} | |" + (" |" if memory else "")
                notes.append(f"- {name}, {row['phase']}: {row['status']}: {_cell(row['reason'])}")
                continue
            times = [format_seconds(row[key]) for key in ("median_s", "q1_s", "q3_s")]
            line += f" {times[0]} ({times[1]} – {times[2]}) | {row['repetitions']} |"
            if memory:
                line += f" {format_bytes(row['peak_bytes'])} |"
            if further := _further(row):
                notes.append(f"- {name}, {row['phase']}: {further}")
            if row.get("memory_reason"):
                notes.append(f"- {name}, {row['phase']}: memory: {_cell(row['memory_reason'])}")
        lines.append(line)
    load = max(row.get("other_load") or 0.0 for row in rows)
    if load >= BUSY:
        notes.append(f"- Other processes kept up to {load:.1f} cores busy: these times are too long.")
    return "\n".join(lines) + ("\n\n" + "\n".join(dict.fromkeys(notes)) if notes else "")


def _further(row: Row) -> str:
    """What few rows have."""
    parts = []
    if row.get("touched"):
        parts.append(f"{row['touched']:,} rows of the table touched")
    if row.get("working_bytes") is not None:
        parts.append(f"memory above weights and optimiser state {format_bytes(row['working_bytes'])}")
    if row.get("process_bytes") is not None and row.get("working_bytes") is not None:
        parts.append(f"of the whole process {format_bytes(row['process_bytes'])}")
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """Three digits in a unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-6)} µs"


def format_bytes(size: int | None) -> str:
    """Three digits in MiB or GiB; a dash for None."""
    if size is None:
        return "—"
    return f"{_three(size / 2**30)} GiB" if size >= 2**30 else f"{_three(size / 2**20)} MiB"


def _three(number: float) -> str:
    digits = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{number:.{min(2, max(0, digits))}f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
