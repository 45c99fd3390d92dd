"""Markdown of the reports: tables, intervals, and where the numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from million_experts.benchmarks.machine import one_line
from million_experts.studies.progress import format_duration
from million_experts.studies.runs import DIVERGED, Row
from million_experts.studies.statistics import Interval, interval

LEFT, RIGHT = "---", "---:"
MODES_NOTE = (
    "The same validation text in batches as in training, read by a trained model whose layers choose experts "
    "as in training (by the batch's statistics, or experts their tokens) and as in evaluation (by the "
    "running statistics, or each token its experts). A negative difference is what the training mode gains. "
    "Then, choosing as in training, the second half of every row gives way to other text: how much the "
    "logits of the first half change (root mean square, largest), the KL divergence of their predictions, "
    "and the loss of the first half before its own future minus that before another one. Were the future of "
    "use, that would be negative. As in evaluation, nothing would change: under BatchNorm to the bit, as a "
    "test makes sure."
)
ALONE_NOTE = (
    "Were experts to choose in generation too, each would take the one token that comes. The loss of the "
    "same text, in nats per token, would be"
)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns are words and stand left, the others right."""
    rule = [LEFT if i < left else RIGHT for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in (list(header), rule, *lines)
    )


def format_interval(value: Interval, digits: int = 3, signed: bool = False) -> str:
    """A mean and half of its interval's width, "3.120 ± 0.004"; the mean alone where there is one value."""
    mean = f"{value.mean:{'+' if signed else ''}.{digits}f}"
    return mean if value.n < 2 else f"{mean} ± {value.half_width:.{digits}f}"


def format_difference(value: Interval | None) -> str:
    """A paired difference, its interval, number of pairs and verdict; "—" where there is no pair."""
    if value is None:
        return "—"
    if value.n < 2:
        return f"{value.mean:+.4f}, n=1"
    return f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}], n={value.n}, {value.verdict}"


def run_names(rows: Iterable[Row]) -> str:
    """The names of runs, as code; those that differ in their last number are joined: `...-seed0,1,2`."""
    joined: dict[str, list[str]] = {}
    for row in rows:
        match = re.fullmatch(r"(.*?)(\d*)", row["name"])
        assert match is not None
        joined.setdefault(match[1], []).append(match[2])
    return ", ".join(f"`{stem}{','.join(sorted(ends))}`" for stem, ends in joined.items())


def diverged_note(rows: Iterable[Row]) -> str:
    """Which runs have no loss, if any, and so are in no mean."""
    diverged = [row for row in rows if row["status"] == DIVERGED]
    if not diverged:
        return ""
    return f"Without a loss, and so in no mean, are {run_names(diverged)}, which diverged."


def provenance(rows: Sequence[Row]) -> str:
    """Where the runs were made: commit, machine and versions; more than one line when not all were alike."""
    counts: dict[str, int] = {}
    for row in rows:
        commit = (row.get("commit") or "no commit")[:12] + (" with changes" if row.get("dirty") else "")
        line = f"{commit}, {row['precision']}, {one_line(row)}"
        counts[line] = counts.get(line, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return "\n".join(f"- {number} rows: {line}" for line, number in counts.items())


def texts_table(rows: Sequence[Row]) -> str:
    """The texts that runs read, which are the same for all."""
    texts: dict[str, Any] = next((row["texts"] for row in rows), {})
    return markdown_table(
        ("text", "tokens", "bytes"),
        [(name, f"{text['tokens']:,}", f"{text['bytes']:,}") for name, text in texts.items()],
    )


def runs_table(rows: Sequence[Row]) -> str:
    """Every run by its name, under which its row stands in the ledger."""
    lines = []
    for row in rows:
        if "steps" not in row:  # no training run, but times of steps
            continue
        validation = row.get("validation", {}).get("loss")
        lines.append(
            (
                f"`{row['name']}`",
                row["parameters"]["label"],
                f"{row['steps']:,}",
                f"{row['tokens'] / 1e6:.2f}M",
                f"{row['epochs']:.2f}",
                f"{row['flops']['total']:.3g}",
                format_duration(row["seconds"]) if "seconds" in row else "—",
                f"{row['peak_bytes'] / 1e9:.1f} GB" if row.get("peak_bytes") else "—",
                row["status"] if validation is None else f"{validation:.4f}",
            )
        )
    header = ("run", "model", "steps", "tokens", "epochs", "FLOPs", "time", "peak memory", "validation, nats")
    return markdown_table(header, lines)


def modes_table(groups: Iterable[tuple[str, Sequence[Row]]]) -> str:
    """What `causality.evaluate_modes` measured of runs, a line for each name and its runs; see `MODES_NOTE`.

    Runs whose layers have one mode are left out; "" where none is left. Under the lines stands what expert
    choice loses on text that comes token by token.
    """
    lines, alone = [], []
    for name, rows in groups:
        measured = [(row, row.get("measured", {})) for row in rows]
        found = {
            row["name"]: modes
            for row, figures in measured
            if (modes := figures.get("batch_norm") or figures.get("expert_choice"))
        }
        if not found:
            continue
        gap = interval([modes["loss_train_mode"] - modes["loss_eval_mode"] for modes in found.values()])
        future = [modes["future"] for modes in found.values() if "future" in modes]
        effect = ("—",) * 4
        if future:
            known = interval([f["loss_own_future"] - f["loss_other_future"] for f in future])
            effect = (
                f"{fmean(f['logit_change'] for f in future):.2g}",
                f"{max(f['largest_logit_change'] for f in future):.2g}",
                f"{fmean(f['divergence'] for f in future):.2g}",
                format_interval(known, 5, signed=True),
            )
        known_alone = [row for row in rows if "loss_alone" in found.get(row["name"], {})]
        if known_alone:
            modes = [found[row["name"]] for row in known_alone]
            loss = format_interval(interval([m["loss_alone"] for m in modes]), 4)
            above = interval([m["loss_alone"] - m["loss_eval_mode"] for m in modes])
            alone.append(
                f"{loss} for {name}, {format_interval(above, 4, signed=True)} to evaluation "
                f"({run_names(known_alone)})"
            )
        lines.append(
            (
                name,
                f"{fmean(modes['loss_train_mode'] for modes in found.values()):.4f}",
                f"{fmean(modes['loss_eval_mode'] for modes in found.values()):.4f}",
                format_interval(gap, 4, signed=True),
                *effect,
                f"{next(iter(found.values()))['tokens']:,}",
                run_names(row for row in rows if row["name"] in found),
            )
        )
    header = (
        "", "as in training, nats", "as in evaluation", "difference", "logits' change", "largest",
        "divergence, nats", "own − other future", "tokens", "runs",
    )  # fmt: skip
    table = markdown_table(header, lines) if lines else ""
    return f"{table}\n\n{ALONE_NOTE} {', '.join(alone)}." if alone else table


def commands(rows: Sequence[Row]) -> str:
    """The commands that made the rows, each once and with the commits that it was given at, as a block.

    Under it are the names of rows that have none.
    """
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("command"):
            commits.setdefault(row["command"], {})[(row.get("commit") or "no commit")[:12]] = None
    lines = [f"# {', '.join(found)}\n{command}" for command, found in commits.items()]
    note = "Each under the commits at which it was given; options left out have the defaults of that time."
    parts = [note, "```console\n" + "\n".join(lines) + "\n```"]
    if without := [row for row in rows if not row.get("command")]:
        parts.append(f"No command, but the settings in their rows, have {run_names(without)}.")
    return "\n\n".join(parts)
