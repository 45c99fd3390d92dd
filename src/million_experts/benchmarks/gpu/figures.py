"""Figures of a run on a GPU: time over N and over T, the roofline, and what learns."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from million_experts.benchmarks.gpu.costs import OPERATIONS, PHASES, PLANNED, Shape

Row = dict[str, Any]

#: Colour and marker of each line, in the order in which they come.
STYLES = [
    ("#2a6fb0", "o"), ("#7fb2dc", "^"), ("#d9772b", "s"), ("#8e6bb0", "P"),
    ("#3a9a5b", "D"), ("#b03a48", "v"), ("#777777", "x"), ("#b59b2a", "*"),
]  # fmt: skip


def draw(rows: list[Row], folder: Path) -> list[str]:
    """Writes the figures that there are rows for; their names."""
    figures: list[tuple[str, Callable[[list[Row]], Any]]] = [
        ("time-over-n.png", lambda rows: _sweep(rows, "n", "experts in the pool, N", lambda s: s.N)),
        ("time-over-t.png", lambda rows: _sweep(rows, "T", "tokens, T", lambda s: s.T)),
        ("time-over-d.png", lambda rows: _sweep(rows, "D", "width, D", lambda s: s.D)),
        ("roofline.png", _roofline),
        ("learns.png", _learns),
    ]
    written = []
    for name, make in figures:
        figure = make(rows)
        if figure is not None:
            figure.savefig(folder / name, dpi=120, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            written.append(name)
    return written


def _layers(rows: Iterable[Row]) -> list[tuple[Shape, Row]]:
    return [
        (Shape(**row["shape"]), row)
        for row in rows
        if row["part"] == "fast" and row["status"] == "timed" and row["phase"] in PHASES
    ]


def _sweep(rows: list[Row], axis: str, label: str, value: Callable[[Shape], float]) -> Any:
    """Time against one size, the others those of the first shape that was timed: the plan's centre."""
    found = _layers(rows)
    if not found:
        return None
    centre = vars(found[0][0])
    found = [(s, r) for s, r in found if all(v == centre[k] for k, v in vars(s).items() if k != axis)]
    figure, axes = plt.subplots(1, len(PHASES), figsize=(15, 4.2))
    names = list(dict.fromkeys(row["competitor"] for _, row in found))
    for ax, phase in zip(axes, PHASES, strict=True):
        for name in names:
            points = sorted(
                (value(s), r["seconds"]["median"], r["seconds"]["q1"], r["seconds"]["q3"])
                for s, r in found
                if r["competitor"] == name and r["phase"] == phase
            )
            if points:
                x, median, low, high = zip(*points, strict=True)
                colour, marker = STYLES[names.index(name) % len(STYLES)]
                ax.plot(x, [v * 1e3 for v in median], color=colour, marker=marker, label=name)
                ax.fill_between(x, [v * 1e3 for v in low], [v * 1e3 for v in high], color=colour, alpha=0.2)
        ax.set(xscale="log", yscale="log", xlabel=label, title=phase)
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("milliseconds")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    fixed = {k: v for k, v in centre.items() if k != axis and k in ("T", "n", "D", "dtype")}
    figure.suptitle(", ".join(f"N={v}^2" if k == "n" else f"{k}={v}" for k, v in fixed.items()), fontsize=10)
    return figure


def _roofline(rows: list[Row]) -> Any:
    """FLOP/s against FLOPs per byte; lines are what the machine reaches."""
    found = [
        (Shape(**row["shape"]), row)
        for row in rows
        if row["part"] == "fast" and row["status"] == "timed" and row["phase"] in OPERATIONS
    ]
    if not found:
        return None
    measured = next((row for row in rows if row["case"] == "ceilings" and "products" in row), None)
    copy, products = (
        (measured["copy"], measured["products"]) if measured else (PLANNED.copy, PLANNED.products)
    )
    figure, ax = plt.subplots(figsize=(8, 5))
    intensities = [row["flops"] / row["bytes"] for _, row in found]
    low, high = min(intensities) / 2, max(max(intensities), products["bfloat16"] / copy) * 4
    for dtype, style in (("bfloat16", "-"), ("float32", "--")):
        corner = products[dtype] / copy
        ax.plot(
            [low, corner, high],
            [low * copy, products[dtype], products[dtype]],
            "k" + style,
            lw=1,
            label=dtype,
        )
    for place, name in enumerate(OPERATIONS):
        own = [
            (r["flops"] / r["bytes"], r["flops"] / r["seconds"]["median"])
            for _, r in found
            if r["phase"] == name
        ]
        if own:
            colour, marker = STYLES[place % len(STYLES)]
            ax.scatter(*zip(*own, strict=True), color=colour, marker=marker, label=name)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="FLOP/s")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    return figure


def _learns(rows: list[Row]) -> Any:
    turns = [row for row in rows if row["part"] == "learns" and row.get("turn") is not None]
    if not turns:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    names = list(dict.fromkeys(row["competitor"] for row in turns))
    for ax, (axis, label) in zip(
        axes, (("seconds", "seconds of training"), ("flops", "training FLOPs")), strict=True
    ):
        for name in names:
            own = [(row[axis], row["valid_loss"]) for row in turns if row["competitor"] == name]
            colour, marker = STYLES[names.index(name) % len(STYLES)]
            ax.plot(*zip(*own, strict=True), color=colour, marker=marker, label=name)
        ax.set(xscale="log", xlabel=label)
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("validation loss, nats per byte")
    axes[0].legend()
    return figure
