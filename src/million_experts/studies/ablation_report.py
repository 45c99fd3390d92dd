"""The report of the ablations: a table for each axis, the paper's Table 2, and what training mode sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from million_experts.layers.retrieval import QUERY_NORMS
from million_experts.lm.figures import panels_in_a_row, save_figure
from million_experts.studies.ablation import AXES, FIXED, Axis, Setup
from million_experts.studies.runs import Row
from million_experts.studies.statistics import Interval, paired_difference
from million_experts.studies.tables import (
    MODES_NOTE,
    diverged_note,
    format_interval,
    markdown_table,
    modes_table,
    run_names,
)

LOSS_FIGURE, USAGE_FIGURE = "ablation-loss.png", "ablation-usage.png"
# Query norm -> colour and marker.
STYLES = {"batch": ("#2a6fb0", "o"), "layer": ("#3a9a5b", "D"), "none": ("#d9772b", "^")}
# Table 2 of arXiv 2407.04153: N -> perplexity, usage in per cent, unevenness; without and with BatchNorm.
PAPER = {
    128**2: ((23.47, 23.47), (100, 100), (0.45, 0.30)),
    256**2: ((22.61, 22.55), (100, 100), (0.63, 0.44)),
    512**2: ((21.54, 21.47), (100, 100), (0.97, 0.66)),
    1024**2: ((20.73, 20.64), (99.8, 100), (1.52, 1.06)),
}


def sections(rows: Sequence[Row], folder: Path) -> list[str]:
    """The parts of the report; its figures go to `folder`."""
    study = _Study(rows)
    fixed = {name: rows[-1]["settings"]["peer"][name] for name in FIXED}
    base = ", ".join(f"{name}={value}" for name, value in {**rows[-1]["labels"]["base"], **fixed}.items())
    parts = [
        f"One choice of the layer at a time; the base, of which the others are changes: {base}. "
        f"{_training(rows)} Validation loss and its difference, to the base unless said otherwise, are "
        "means over seeds, the difference paired by seed with half of its 95 % interval (Student's t): "
        "*lower* and *higher* exclude 0, a *tie* does not, and one seed (*?*) says nothing: it is compared "
        "with the base's run of that seed, not with its mean. Perplexity is that of the mean. Usage and "
        f"unevenness (KL from uniform, nats) are over {_usage_tokens(rows)} validation "
        "tokens, each read once, the mean of the layers where there are several."
    ]
    if note := diverged_note(rows):
        parts.append(note)
    for axis in AXES.values():
        setups = study.present(axis.setups(study.base, study.pools))
        if any(setup != axis.reference(setup, study.base) for setup in setups):
            setups = setups if study.base in setups else study.present([study.base, *setups])
            parts += [f"## {axis.question}", axis.note, _table(study, setups, axis)]
            if axis is AXES["num_experts"]:
                parts.append(_each_step(study, sorted(setups, key=lambda setup: setup.num_experts)))
    parts += _table_2(study)
    parts += _modes(study)
    return [*parts, *_figures(study, folder)]


class _Study:
    """Finished runs by setup and seed."""

    def __init__(self, rows: Sequence[Row]):
        self.base = Setup(**rows[-1]["labels"]["base"])
        self.runs: dict[Setup, dict[int, Row]] = {}
        for row in rows:
            if "validation" in row:
                self.runs.setdefault(Setup(**row["labels"]["setup"]), {})[row["seed"]] = row
        self.pools = sorted({setup.num_experts for setup in self.runs})

    def present(self, setups: Iterable[Setup]) -> list[Setup]:
        return [setup for setup in dict.fromkeys(setups) if setup in self.runs]

    def rows(self, setup: Setup) -> list[Row]:
        return [row for _, row in sorted(self.runs.get(setup, {}).items())]

    def losses(self, setup: Setup) -> dict[int, float]:
        return {seed: row["validation"]["loss"] for seed, row in self.runs.get(setup, {}).items()}

    def loss(self, setup: Setup) -> float:
        return fmean(self.losses(setup).values())

    def difference(self, setup: Setup, reference: Setup) -> Interval | None:
        return paired_difference(self.losses(setup), self.losses(reference))

    def usages(self, setup: Setup, name: str) -> dict[int, float]:
        """A figure of expert usage by seed, the mean over layers."""
        return {
            seed: fmean(layer[name] for layer in row["measured"]["usage"].values())
            for seed, row in self.runs.get(setup, {}).items()
        }

    def usage(self, setup: Setup, name: str) -> float:
        """The mean over seeds of a figure of expert usage."""
        return fmean(self.usages(setup, name).values())


def _training(rows: Sequence[Row]) -> str:
    """Width, depth and tokens, which differ between runs where a budget of FLOPs decides on them."""
    settings = rows[-1]["settings"]
    steps, tokens = ([row[name] for row in rows] for name in ("steps", "tokens"))
    low, high = f"{min(tokens) / 1e6:.2f}M", f"{max(tokens) / 1e6:.2f}M"
    model = f"{settings['num_hidden_layers']} blocks of width {settings['hidden_size']}"
    if min(steps) == max(steps):
        return f"{model}, {min(steps):,} steps, {low} tokens."
    flops = max(row["flops"]["total"] for row in rows)
    return (
        f"{model}, {min(steps):,} to {max(steps):,} steps, {low} to {high} tokens, as many as {flops:.2g} "
        "training FLOPs pay for."
    )


def _usage_tokens(rows: Sequence[Row]) -> str:
    counts = {layer["tokens"] for row in rows for layer in row.get("measured", {}).get("usage", {}).values()}
    return " or ".join(f"{count:,}" for count in sorted(counts)) or "no"


def _table(study: _Study, setups: Sequence[Setup], axis: Axis) -> str:
    rows = [row for setup in setups for row in study.rows(setup)]
    # Times of other processors, or with other threads, cannot be compared.
    timed = len({(row["machine"]["cpu"], row["threads"]) for row in rows}) == 1
    header = (
        "change", "validation, nats", "perplexity", "difference", "", "usage", "unevenness", "FLOPs a token",
        *(["seconds a step"] if timed else []), "runs",
    )  # fmt: skip
    lines = [_line(study, setup, axis.reference(setup, study.base), timed) for setup in setups]
    return markdown_table(header, lines)


def _line(study: _Study, setup: Setup, reference: Setup, timed: bool) -> tuple[str, ...]:
    rows, loss = study.rows(setup), study.loss(setup)
    found = study.difference(setup, reference) if setup != reference else None
    return (
        setup.changes(study.base),
        f"{loss:.4f}",
        f"{math.exp(loss):.2f}",
        "—" if found is None else format_interval(found, 4, signed=True),
        "" if found is None else found.verdict,
        f"{study.usage(setup, 'usage'):.1%}",
        f"{study.usage(setup, 'unevenness'):.2f}",
        f"{rows[0]['flops']['per_token'] / 1e6:.2f}M",
        *([f"{fmean(row['seconds_per_step'] for row in rows):.3f}"] if timed else []),
        run_names(rows),
    )


def _each_step(study: _Study, setups: Sequence[Setup]) -> str:
    """Whether every larger pool has the lower loss."""
    lines = []
    for smaller, larger in itertools.pairwise(setups):
        found = study.difference(larger, smaller)
        if found is not None:
            step = f"{smaller.num_experts:,} to {larger.num_experts:,}"
            runs = run_names([*study.rows(smaller), *study.rows(larger)])
            lines.append((step, format_interval(found, 4, signed=True), f"{found.n}", found.verdict, runs))
    return markdown_table(("from one pool to the next", "difference, nats", "seeds", "", "runs"), lines)


def _table_2(study: _Study) -> list[str]:
    """The paper's Table 2, of ours and its own figures."""
    lines, gains = [], []
    for pool in study.pools:
        setups = {
            norm: replace(study.base, num_experts=pool, query_norm=norm)
            for norm in ("none", "batch", "layer")
        }
        own = {norm: setup for norm, setup in setups.items() if setup in study.runs}
        if not {"none", "batch"} <= own.keys():
            continue
        paper = PAPER.get(pool)
        cells = []
        for i, (format_, figure) in enumerate(
            (
                ("{:.2f}", lambda setup: math.exp(study.loss(setup))),
                ("{:.1f}", lambda setup: 100 * study.usage(setup, "usage")),
                ("{:.2f}", lambda setup: study.usage(setup, "unevenness")),
            )
        ):
            cells.append(" / ".join(format_.format(figure(own[n])) if n in own else "—" for n in setups))
            cells.append("—" if paper is None else " / ".join(f"{value:g}" for value in paper[i]))
        lines.append(
            (f"{pool:,}", *cells, run_names(row for setup in own.values() for row in study.rows(setup)))
        )
        gains.append((f"{pool:,}", *_gains(study, own["batch"], own["none"])))
    if not lines:
        return []
    header = (
        "N", "perplexity", "paper's", "usage, %", "paper's", "unevenness", "paper's", "runs",
    )  # fmt: skip
    return [
        "## Query norm: the paper's Table 2",
        "Each cell: without a norm / with BatchNorm / with LayerNorm; the paper's: without / with "
        "BatchNorm. Its models are larger by far, its text is C4: compare the differences, not the levels.",
        markdown_table(header, lines),
        "What BatchNorm changes against no norm, paired by seed:",
        markdown_table(
            ("N", "validation, nats", "", "usage, points", "", "unevenness, nats", "", "seeds"), gains
        ),
    ]


def _gains(study: _Study, own: Setup, other: Setup) -> list[str]:
    """Differences of loss, usage and unevenness, each with its verdict, and the number of pairs."""

    def points(setup: Setup) -> dict[int, float]:
        return {seed: 100 * share for seed, share in study.usages(setup, "usage").items()}

    loss = study.difference(own, other)
    usage = paired_difference(points(own), points(other))
    unevenness = paired_difference(study.usages(own, "unevenness"), study.usages(other, "unevenness"))
    cells: list[str] = []
    for found, digits in ((loss, 4), (usage, 1), (unevenness, 2)):
        cells += ["—", ""] if found is None else [format_interval(found, digits, True), found.verdict]
    return [*cells, "0" if loss is None else str(loss.n)]


def _modes(study: _Study) -> list[str]:
    """Training and evaluation mode under query BatchNorm, on the same text."""
    table = modes_table((setup.changes(study.base), study.rows(setup)) for setup in study.runs)
    return ["## Query BatchNorm: does it see the future?", MODES_NOTE, table] if table else []


def _figures(study: _Study, folder: Path) -> list[str]:
    """Loss against the pool, the experts at work and the heads, and usage against the pool."""
    norms = {
        norm: study.present(replace(study.base, num_experts=pool, query_norm=norm) for pool in study.pools)
        for norm in QUERY_NORMS
    }
    norms = {norm: setups for norm, setups in norms.items() if len(setups) > 1}
    base = study.base
    sizes = (  # of the panels that vary the base's layer: axis, what is varied, what it is called
        ("active", lambda setup: setup.active, f"experts at work, {base.num_experts:,} in the pool"),
        ("heads", lambda setup: setup.num_heads, f"heads, {base.active} experts at work in all"),
    )
    varied = []
    for axis, size, label in sizes:
        setups = study.present([base, *AXES[axis].setups(base, study.pools)])
        if len(setups) > 1:
            varied.append((sorted(setups, key=size), size, label))
    parts = []
    if norms or varied:
        figure, panels = panels_in_a_row(bool(norms) + len(varied))
        panels[0].set(ylabel="validation loss, nats per token")
        for norm, setups in norms.items():
            _curve(panels[0], study, setups, lambda setup: setup.num_experts, norm)
        if norms:
            _show_pools(panels[0], norms.values())
        if len(norms) > 1:
            panels[0].legend(title="query norm", frameon=False)
        for axes, (setups, size, label) in zip(panels[bool(norms) :], varied, strict=True):
            _curve(axes, study, setups, size, base.query_norm)
            axes.set(xlabel=label)
            _show_numbers(axes, [size(setup) for setup in setups])
        save_figure(figure, folder / LOSS_FIGURE)
        parts.append(
            f"![Validation loss against experts]({LOSS_FIGURE})\n\nPoints are runs, lines the means over "
            "seeds."
        )
    if norms:
        figure, (left, right) = panels_in_a_row(2)
        for norm, setups in norms.items():
            for axes, name in ((left, "usage"), (right, "unevenness")):
                color, marker = STYLES[norm]
                values = [study.usage(setup, name) for setup in setups]
                axes.plot([s.num_experts for s in setups], values, marker=marker, color=color, label=norm)
        for axes in (left, right):
            _show_pools(axes, norms.values())
        left.set(ylabel="share of the experts used", ylim=(0, 1.03))
        right.set(ylabel="unevenness, nats")
        right.set_ylim(bottom=0)
        right.legend(title="query norm", frameon=False)
        save_figure(figure, folder / USAGE_FIGURE)
        parts.append(f"![Expert usage and unevenness against the pool]({USAGE_FIGURE})")
    return ["## Figures", *parts] if parts else []


def _show_pools(axes: Any, curves: Iterable[Sequence[Setup]]) -> None:
    axes.set(xlabel="experts in the pool")
    _show_numbers(axes, sorted({setup.num_experts for setups in curves for setup in setups}))


def _show_numbers(axes: Any, numbers: Sequence[int]) -> None:
    """A logarithmic axis that is marked where there are points."""
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()


def _curve(axes: Any, study: _Study, setups: Sequence[Setup], size: Any, norm: str) -> None:
    color, marker = STYLES[norm]
    for setup in setups:
        losses = list(study.losses(setup).values())
        axes.plot([size(setup)] * len(losses), losses, marker, color=color, ms=4, mfc="none", alpha=0.6)
    axes.plot([size(s) for s in setups], [study.loss(s) for s in setups], color=color, label=norm)
