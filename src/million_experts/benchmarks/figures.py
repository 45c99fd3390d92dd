"""Figures of a run: how near the targets are, and time and memory against N, T, k."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from million_experts.benchmarks import cases
from million_experts.benchmarks.case import (
    COMPILED,
    DENSE,
    MIXTRAL,
    OURS,
    PEER_PYTORCH,
    PKM,
    REFERENCE,
)
from million_experts.benchmarks.cases import CENTRE
from million_experts.benchmarks.cases_steps import DENSE_GRADIENTS, SMALL, SPARSE
from million_experts.benchmarks.report import format_bytes, format_seconds, outcomes
from million_experts.benchmarks.targets import Row
from million_experts.lm.figures import save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

# Colour and marker, so that lines can be told apart without colour too.
STYLES = {
    OURS: ("#2a6fb0", "o"),
    REFERENCE: ("#7fb2dc", "o"),
    COMPILED: ("#8e6bb0", "P"),
    PEER_PYTORCH: ("#d9772b", "s"),
    PKM: ("#3a9a5b", "D"),
    MIXTRAL[0]: ("#b03a48", "^"),
    MIXTRAL[1]: ("#e8a0a8", "v"),
    DENSE: ("#777777", "x"),
    SPARSE: ("#2a6fb0", "o"),
    SMALL: ("#8e6bb0", "D"),
    DENSE_GRADIENTS: ("#7fb2dc", "^"),
}
# Lines that the figures are about.
BOLD = (OURS, SPARSE)

# Phase, what is plotted of its rows, title, and how that is written.
Panel = tuple[str, str, str, Callable[[float], str]]
PANELS: tuple[Panel, ...] = (
    ("forward", "median_s", "inference: time of a forward pass", format_seconds),
    ("step", "median_s", "training: time of a step", format_seconds),
    ("step", "peak_bytes", "training: peak memory above the start", lambda size: format_bytes(round(size))),
)


@dataclass(frozen=True)
class Sweep:
    """What a figure has on its horizontal axis, and which panels.

    Attributes:
        central: the central case of the sweeps lies on this one too.
    """

    group: str
    argument: str
    label: str
    tick: Callable[[float], str]
    about: str
    panels: tuple[Panel, ...] = PANELS
    precision: str = "float32"
    central: bool = True


SWEEPS = (
    Sweep(
        "N", "num_experts", "experts in the pool, N", lambda n: f"{round(n**0.5)}²", "dim 256, k=16, T=2048"
    ),
    Sweep("T", "tokens", "tokens, T", lambda t: f"{t:.0f}", "dim 256, N=512², k=16"),
    Sweep(
        "k",
        "experts_per_head",
        "experts a token, K",
        lambda k: f"{8 * k:.0f}",
        "dim 256, N=512², T=2048",
    ),
    Sweep(
        "steps",
        "num_experts",
        "experts in the pool, N",
        lambda n: f"{round(n**0.5)}²",
        "dim 256, k=16, T=1024",
        PANELS[1:],
        "float32 unless said",
        central=False,
    ),
)


def draw_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws what the rows suffice for, and returns the files."""
    drawn = []
    for sweep in SWEEPS:
        path = folder / f"sweep-{sweep.group.lower()}.png"
        if sweep_figure(sweep, rows, path):
            drawn.append(path)
    if targets_figure(rows, folder / "targets.png"):
        drawn.append(folder / "targets.png")
    return drawn


def sweep_figure(sweep: Sweep, rows: Iterable[Row], path: Path) -> bool:
    """A panel each for times and memory; False where there are no two points."""
    points = [row for row in rows if row["status"] == "measured" and _on_sweep(sweep, row)]
    # Layers without experts have no N and no k: theirs are those of the case that they were measured in.
    places = {row["case"]: row["shape"][sweep.argument] for row in points if sweep.argument in row["shape"]}
    if len(set(places.values())) < 2:
        return False
    size = (4.5 * len(sweep.panels), 4.6)
    figure, panels = plt.subplots(1, len(sweep.panels), figsize=size, layout="constrained")
    for axes, (phase, quantity, title, text) in zip(panels, sweep.panels, strict=True):
        for name, (color, marker) in STYLES.items():
            line = _line(points, places, name, phase, quantity)
            if not line:
                continue
            x = [place for place, _ in line]
            width = 2.4 if name in BOLD else 1.4
            axes.plot(
                x, [row[quantity] for _, row in line], color=color, marker=marker, lw=width, ms=5, label=name
            )
            if quantity == "median_s":
                axes.fill_between(
                    x,
                    [r["q1_s"] for _, r in line],
                    [r["q3_s"] for _, r in line],
                    color=color,
                    alpha=0.2,
                    lw=0,
                )
        axes.set(xscale="log", xlabel=sweep.label, title=title)
        axes.set_yscale("log", base=4 if quantity == "peak_bytes" else 10)  # 4: round numbers of MiB
        ticks = sorted(set(places.values()))
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: sweep.tick(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if quantity == "median_s":  # powers of ten alone tell too little
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 4 if len(sweep.panels) > 2 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(
        f"{sweep.about}, 8 heads, {sweep.precision}; bands lie between the quartiles", fontsize=11
    )
    save_figure(figure, path)
    return True


def _line(
    points: Iterable[Row], places: Mapping[str, Any], name: str, phase: str, quantity: str
) -> list[tuple[float, Row]]:
    found = [
        (places[row["case"]], row)
        for row in points
        if row["competitor"] == name and row["phase"] == phase and row[quantity] and row["case"] in places
    ]
    return sorted(found, key=lambda pair: pair[0])


def _on_sweep(sweep: Sweep, row: Row) -> bool:
    """A point of the sweep itself, or the central case, which lies on several."""
    if row.get("group") == sweep.group:
        return True
    centre = next(c.name for c in cases.SWEEP_CASES if _is_centre(c.competitors[0].arguments))
    return sweep.central and row["case"] == centre


def _is_centre(shape: Mapping[str, Any]) -> bool:
    return all(shape[name] == value for name, value in CENTRE.items())


def targets_figure(rows: Sequence[Row], path: Path) -> bool:
    """A line for each target: how far its ratio is from its bound; False without any ratio."""
    found = [outcome for outcome in outcomes(rows) if outcome.ratio is not None]
    if not found:
        return False
    figure, axes = plt.subplots(figsize=(11, 1.3 + 0.34 * len(found)), layout="constrained")
    ends = []
    for place, outcome in enumerate(found):
        target, ratio = outcome.target, outcome.ratio or 0.0
        color = "#2a6fb0" if outcome.met else "#b03a48"
        times = [1 + target.worse_by(value, target.bound) for value in (ratio, outcome.low, outcome.high)]
        axes.plot(times[:1], [place], "o", color=color, ms=8)
        axes.hlines(place, min(times), max(times), color=color, lw=2, zorder=0)
        axes.text(
            1.02,
            place,
            f"{target.show(ratio)}, target {target.bound_text}",
            color=color,
            va="center",
            transform=axes.get_yaxis_transform(),
        )
        ends += times
    axes.axvline(1, color="#777777", ls="--", lw=1)
    names = [
        target.title if target.name in target.title else f"{target.name}: {target.title}"
        for target in (outcome.target for outcome in found)
    ]
    axes.set_yticks(range(len(found)), names)
    axes.invert_yaxis()
    axes.set(
        xscale="log",
        xlim=(min(0.45, 0.9 * min(ends)), max(2.2, 1.1 * max(ends))),
        xlabel="times its target: left of the line is better (lines: between quartiles)",
        title="Ratios and their targets",
    )
    axes.xaxis.set_major_locator(FixedLocator([0.125, 0.25, 0.5, 1, 2, 4, 8]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
    return True
