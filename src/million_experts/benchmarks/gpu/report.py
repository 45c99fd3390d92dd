"""Rows of a run as a page with figures, and as the README's table.

python -m million_experts.benchmarks.gpu.report FOLDER --output docs/results/gpu --readme README.md
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from million_experts.benchmarks.gpu import rows as files
from million_experts.benchmarks.gpu.costs import OPERATIONS, PHASES, Shape
from million_experts.benchmarks.gpu.learns import outcome
from million_experts.benchmarks.gpu.rows import BAD, latest
from million_experts.benchmarks.gpu.summary import targets
from million_experts.lm.files import write_whole

Row = dict[str, Any]

PAGE = "results.md"
#: The README's table stands between these; its last column is this page's.
BEGIN, END = "<!-- gpu: the last column is written by benchmarks.gpu.report -->", "<!-- /gpu -->"
NOT_MEASURED = "not measured"

LEGEND = """\
T tokens, N experts in the pool, D numbers per row; 8 heads of 16 experts each, no GLU, unless said. Medians
of CUDA events after a warm-up, second cache emptied before each run, clocks as they were. A roofline is the
least time that the bytes allow, each tensor of an operation once and of the table the rows that are used, at
the bandwidth of a large copy; or that the FLOPs allow, at the rate of a large matrix product in the same
type, where that is more.

- *dense gradients*: torch's AdamW, fused; *sparse*: `RowwiseAdamW`, second moments by row.
- *gathers and einsum*: rows looked up as tensors [T, K, D], as PEER-pytorch has it; the same, compiled.
- *grouped mixture*: 2 of 8 experts of width 2*D, one grouped product for all; *product-key memory*: the same
  retrieval, values summed by `nn.EmbeddingBag`."""


def page(all_rows: list[Row], figures: Iterable[str]) -> str:
    """The whole page."""
    rows = latest(all_rows)
    parts = [
        "# On a GPU",
        _provenance(all_rows),
        LEGEND,
        "## Right?",
        _right(rows),
        "## Targets",
        _targets(rows),
    ]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    parts += ["## Operations", _operations(rows), "## Layers", *_layers(rows)]
    if why := list(_why(rows)):
        parts += ["## Why", *why]
    if arms := outcome([row for row in rows if row["part"] == "learns"]):
        parts += ["## Does it learn more?", _learns(arms)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table; columns whose names begin with a space are numbers."""
    marks = ["---:" if name.startswith(" ") else "---" for name in columns]
    cells = [
        [name.strip() for name in columns],
        marks,
        *([cell.replace("|", "/") for cell in line] for line in lines),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def microseconds(seconds: float) -> str:
    """Three digits with a unit."""
    for scale, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def _provenance(rows: list[Row]) -> str:
    """Where the rows were measured, with what, and of which source."""
    lines = []
    runs = {row["run"] for row in latest(rows)}
    for run in dict.fromkeys(row["run"] for row in rows if row["run"] in runs):
        head: Row = next((r for r in rows if r["run"] == run and r.get("part") == "run"), {})
        gpu: Row = next((r for r in rows if r["run"] == run and r.get("part") == "machine"), {})
        versions = ", ".join(f"{name} {value}" for name, value in head.get("versions", {}).items() if value)
        cuda = f", CUDA {gpu['cuda']}, driver {gpu.get('driver')}" if gpu.get("cuda") else ""
        commit = (head.get("commit") or "unknown")[:12] + (" with changes" if head.get("dirty") else "")
        rehearsal = " **A rehearsal in the interpreter at tiny shapes: no time here means anything.**"
        lines.append(
            f"- {run}: {gpu.get('gpu', 'no GPU')}{cuda}; {versions}; commit {commit}, "
            f"source {head.get('source')}." + (rehearsal if head.get("rehearsal") else "")
        )
    return "\n".join(lines)


def _right(rows: list[Row]) -> str:
    """How many cases of each kind are right, and what is not."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == "right":
            kinds.setdefault(_kind(row["case"]), []).append(row)
    lines = []
    for kind, own in kinds.items():
        right = [row for row in own if row["status"] == "right"]
        worst = max((row["error"] or 0.0 for row in right), default=0.0)
        lines.append([kind, str(len(own)), str(len(right)), f"{worst:.1e}"])
    text = table(["kernels", " cases", " right", " largest relative error of those"], lines)
    for row in rows:
        if row["status"] in BAD:
            competitor = f", {row['competitor']}" if row.get("competitor") else ""
            text += f"\n\n**{row['status']}**: {row['case']}{competitor}: {row.get('fault', '')}"
        if row["case"] == "tf32x3" and "norms" in row:
            told = ", ".join(f"{name} {error:.1e}" for name, error in row["norms"].items())
            keeps = "keep" if row["keeps_float32"] else "do **not** keep"
            text += f"\n\nProducts of tiles (`tf32x3`) {keeps} float32's precision: relative errors {told}."
    return text


def _kind(case: str) -> str:
    if case.startswith("experts"):
        return "experts"
    return next(
        (k for k in ("retrieval", "row-wise AdamW", "BatchNorm", "layer") if case.startswith(k)), case
    )


def _targets(rows: list[Row]) -> str:
    return table(
        ["target", " measured", " wanted, at most", ""],
        (
            [name, "-", f"{bound:.3g}", NOT_MEASURED]
            if ratio is None
            else [name, f"{ratio:.3g}", f"{bound:.3g}", "met" if ratio <= bound else "**not met**"]
            for name, ratio, bound in targets(rows)
        ),
    )


def timed(rows: Iterable[Row], phases: Iterable[str]) -> Iterator[tuple[Shape, Row]]:
    """The times of some phases or operations, with their shapes."""
    wanted = set(phases)
    for row in rows:
        if row["part"] == "fast" and row["status"] == "timed" and row["phase"] in wanted:
            yield Shape(**row["shape"]), row


def _operations(rows: list[Row]) -> str:
    lines = []
    for shape, row in timed(rows, OPERATIONS):
        seconds = row["seconds"]
        quartiles = f"{microseconds(seconds['q1'])} to {microseconds(seconds['q3'])}"
        counted = f"{row['bytes'] / 1e6:,.1f}", f"{row['flops'] / 1e9:,.1f}"
        least = microseconds(row["roofline_seconds"]), f"{row['over_roofline']:.2f}"
        median = microseconds(seconds["median"])
        lines.append([row["phase"], str(shape), median, quartiles, *counted, *least])
    columns = ["operation", "shape", " time", " quartiles", " MB", " GFLOP", " roofline", " over it"]
    return table(columns, lines)


def _layers(rows: list[Row]) -> Iterator[str]:
    """A table for each shape: layers against phases."""
    cases: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["part"] == "fast" and "competitor" in row and row.get("phase") in (*PHASES, "all"):
            name = str(Shape(**row["shape"]))
            cases.setdefault(name, {}).setdefault(row["competitor"], {})[row["phase"]] = row
    for shape, competitors in cases.items():
        yield f"### {shape}"
        yield table(
            ["layer", *(f" {phase}, over roofline" for phase in PHASES), " step, peak above weights"],
            (
                [
                    name,
                    *(_cell(found.get(phase) or found.get("all")) for phase in PHASES),
                    _peak(found.get("step")),
                ]
                for name, found in competitors.items()
            ),
        )


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "timed":
        return row["status"]
    return f"{microseconds(row['seconds']['median'])}, {row['over_roofline']:.1f}"


def _peak(row: Row | None) -> str:
    return "-" if row is None or row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e9:.2f} GB"


def _why(rows: list[Row]) -> Iterator[str]:
    """For each operation looked at: kernels by time, by binary, by counters."""
    own = [row for row in rows if row["part"] == "why"]
    for head in [row for row in own if row.get("about") == "operation"]:
        yield f"### {head['phase']}: {Shape(**head['shape'])}, {head['over_roofline']:.2f} times its roofline"
        mine = [row for row in own if row.get("phase") == head["phase"]]
        if times := [row for row in mine if row["about"] == "times"]:
            yield table(
                ["kernel", " launches", " us"],
                ([f"`{r['kernel'][:70]}`", str(r["launches"]), f"{r['microseconds']:.1f}"] for r in times),
            )
        if binaries := [row for row in mine if row["about"] == "binary"]:
            names = ("warps", "registers", "spills", "shared_bytes")
            yield table(
                ["kernel", *(f" {n.replace('_', ' ')}" for n in names), " occupancy", "bound by"],
                (
                    [r["kernel"], *(str(r[n]) for n in names), f"{r['occupancy']:.0%}", r["bound_by"]]
                    for r in binaries
                ),
            )
        if launches := [row for row in mine if row["about"] == "counters"]:
            counted = [name for name in launches[0] if name not in _NO_COUNTERS]
            yield table(
                ["kernel", *(f" {name.replace('_', ' ')}" for name in counted)],
                ([f"`{r['kernel'][:50]}`", *(_number(r[name]) for name in counted)] for r in launches),
            )
    for row in own:
        if row["status"] == "unavailable" and row.get("about") == "counters":
            yield f"No counters: {row['fault']}."


_NO_COUNTERS = (
    "run",
    "time",
    "part",
    "case",
    "phase",
    "shape",
    "over_roofline",
    "status",
    "about",
    "kernel",
    "launch",
)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _learns(arms: list[Row]) -> str:
    first = arms[0]
    columns = [
        "arm",
        " parameters, millions",
        " thousand bytes per second",
        f" loss at {first['flops']:.2g} FLOPs, nats per byte",
        f" loss after {first['seconds']:.0f} s",
    ]
    lines = []
    for arm in arms:
        size, speed = f"{arm['parameters'] / 1e6:,.1f}", f"{arm['tokens_per_second'] / 1e3:,.0f}"
        losses = (arm["at_equal_flops"], arm["at_equal_time"])
        lines.append([arm["competitor"], size, speed, *("-" if v is None else f"{v:.4f}" for v in losses)])
    return table(columns, lines)


def readme_cells(all_rows: list[Row]) -> dict[str, str]:
    """The last column of the README's table by the word that its first column begins with."""
    rows = latest(all_rows)
    cells = {}
    for word in ("experts", "retrieval", "row-wise AdamW"):
        found = [(s, r) for s, r in timed(rows, OPERATIONS) if r["phase"].startswith(word)]
        checked = [row for row in rows if row["part"] == "right" and _kind(row["case"]) == word]
        if not found and not checked:
            continue
        right = sum(row["status"] == "right" for row in checked)
        told = f"{right} of {len(checked)} cases right"
        if found:
            shape = found[0][0]
            mine = [r for s, r in found if s == shape]
            told += f"; at {shape}: " + ", ".join(
                f"{r['phase'].removeprefix(f'{word}, ')} {microseconds(r['seconds']['median'])}, "
                f"{r['over_roofline']:.2f} x roofline"
                for r in mine
            )
        cells[word] = told
    layers = [(s, r) for s, r in timed(rows, PHASES) if r["competitor"].startswith("PEER, sparse")]
    if layers:
        shape = layers[0][0]
        phases = {r["phase"]: microseconds(r["seconds"]["median"]) for s, r in layers if s == shape}
        told = ", ".join(f"{phase} {time}" for phase, time in phases.items())
        cells["what stays with plain PyTorch"] = f"in the whole layer's: {told}"
    return cells


def fill(readme: str, cells: dict[str, str]) -> str:
    """The README with the last column of its table as `cells` has it, or as not measured.

    Raises:
        ValueError: the table's markers are not there.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README must have its table between {BEGIN} and {END}, once")
    before, _, rest = readme.partition(BEGIN)
    body, _, after = rest.partition(END)
    lines = []
    for line in body.splitlines():
        if line.startswith("| ") and not line.startswith("| kernels"):
            *others, _ = line[1:-1].split("|")
            first = others[0].strip()
            told = next((text for word, text in cells.items() if first.startswith(word)), NOT_MEASURED)
            line = f"|{'|'.join(others)}| {told} |"
        lines.append(line)
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Makes a page, figures and the README's table of a run's rows."
    )
    parser.add_argument("rows", type=Path, help="the run's folder, or its file of rows")
    parser.add_argument("--output", type=Path, default=Path("docs/results/gpu"))
    parser.add_argument("--readme", type=Path, help="whose table is filled")
    options = parser.parse_args(arguments)
    found = files.read(options.rows)
    if not latest(found):
        parser.error(f"no case has come to an end in {options.rows}")
    rehearsal = any(row.get("rehearsal") for row in found)
    if rehearsal and options.readme:
        parser.error("rows of a rehearsal measure nothing: the README is not filled with them")
    from million_experts.benchmarks.gpu.figures import draw

    options.output.mkdir(parents=True, exist_ok=True)
    figures = draw(latest(found), options.output)
    write_whole(options.output / PAGE, page(found, figures))
    if options.rows.resolve() not in (options.output.resolve(), (options.output / files.FILE).resolve()):
        write_whole(options.output / files.FILE, "".join(json.dumps(row) + "\n" for row in found))
    if options.readme:
        write_whole(options.readme, fill(options.readme.read_text(), readme_cells(found)))
    print(options.output / PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
