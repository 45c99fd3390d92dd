"""Figures of a run, as PNG files."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from million_experts._terminal import printable
from million_experts.layers import ExpertUsage
from million_experts.lm.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2a6fb0", "#d9772b", "#777777"


def loss_figure(
    history: Sequence[Mapping[str, Any]],
    bits_per_nat: float,
    yardsticks: Mapping[str, float],
    title: str,
    path: Path,
) -> None:
    """Training and validation loss over steps in bits per byte, with lines to compare with.

    Args:
        history: the trainer's log, with `step` and `loss` or `eval_loss` in nats per token.
        bits_per_nat: factor from nats per token to bits per byte, the test split's for all: the splits differ
            little in it. These losses are of packed blocks, in which a document may be cut; the yardsticks
            and the test loss are of whole documents.
        yardsticks: label -> bits per byte, drawn as horizontal lines.
        path: where the PNG goes.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    train = [(row["step"], row["loss"] * bits_per_nat) for row in history if "loss" in row]
    validation = [(row["step"], row["eval_loss"] * bits_per_nat) for row in history if "eval_loss" in row]
    if train:
        axes.plot(*zip(*train, strict=True), color=BLUE, alpha=0.55, lw=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color=ORANGE, marker="o", ms=4, label="validation")
    for (label, value), style in zip(yardsticks.items(), ("--", ":", "-.", (0, (1, 4))), strict=False):
        axes.axhline(value, color=GREY, ls=style, lw=1, label=f"{label}: {value:.3f}")
    lowest = min([v for _, v in train + validation] + list(yardsticks.values()), default=0)
    highest = max([v for _, v in validation] + list(yardsticks.values()), default=1)
    if highest > lowest:
        axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.25 * (highest - lowest))
    axes.set(xlabel="step", ylabel="bits per byte", title=printable(title))
    if axes.lines:
        axes.legend(framealpha=1, edgecolor="none", borderaxespad=0)  # opaque: a yardstick may pass behind
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def resources_figure(
    history: Sequence[Mapping[str, Any]], tokens_per_step: int, title: str, path: Path
) -> None:
    """Tokens a second and the memory of the process over steps.

    Args:
        history: the trainer's log, with `step`, `seconds_per_step` and `memory_gb`.
        path: where the PNG goes.
    """
    figure, (above, below) = plt.subplots(2, figsize=(7.2, 5.2), layout="constrained", sharex=True)
    speed = [
        (row["step"], tokens_per_step / row["seconds_per_step"])
        for row in history
        if "seconds_per_step" in row
    ]
    memory = [(row["step"], row["memory_gb"]) for row in history if "memory_gb" in row]
    for axes, points, color, label in (
        (above, speed, BLUE, "tokens a second, training alone"),
        (below, memory, ORANGE, "memory of the process, GB"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=".", ms=3, lw=1)
            axes.set_ylim(0, 1.15 * max(value for _, value in points))
        axes.set_title(label, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    below.set_xlabel("step")
    figure.suptitle(printable(title), fontsize=11)
    save_figure(figure, path)


def usage_figure(usages: Mapping[str, ExpertUsage], title: str, path: Path) -> None:
    """Share of the gate mass by expert, from the busiest to the idlest, a panel for each layer.

    Args:
        usages: label -> usage of a layer; heads are drawn thin, all heads together thick.
        path: where the PNG goes.
    """
    figure, panels = plt.subplots(
        1, len(usages), figsize=(max(6.4, 4.6 * len(usages)), 4.2), layout="constrained", squeeze=False
    )
    for axes, (name, usage) in zip(panels[0], usages.items(), strict=True):
        for head in range(usage.layer.num_heads):
            _rank_curve(axes, usage.shares(head).numpy(), color=BLUE, lw=0.6, alpha=0.4)
        together = usage.shares().numpy()
        figures = usage.figures()
        _rank_curve(axes, together, color=ORANGE, lw=2, label="all heads")
        axes.plot([], [], color=BLUE, lw=0.6, label="each head")
        axes.axhline(1 / len(together), color=GREY, ls="--", lw=1, label="uniform")
        axes.set(xscale="log", yscale="log", xlabel="expert, by rank", ylabel="share of the gate mass")
        axes.set_ylim(bottom=max(1e-12, 1e-3 / len(together)))
        axes.set_title(
            f"{name}\n{len(together):,} experts, {figures.usage:.1%} used, "
            f"unevenness {figures.unevenness:.2f} nats, top share {figures.top_share:.2%}",
            fontsize=9,
        )
        axes.legend(frameon=False, loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(printable(title), fontsize=11)
    save_figure(figure, path)


def _rank_curve(axes: Any, shares: np.ndarray, **style: Any) -> None:
    used = np.sort(shares[shares > 0])[::-1]
    # Log-spaced ranks: a million points would make the picture no better.
    ranks = np.unique(np.geomspace(1, len(used), 400).astype(int))
    axes.plot(ranks, used[ranks - 1], **style)


def panels_in_a_row(count: int, width: float = 4.8, height: float = 4.0) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `count` panels without frames, each so many inches wide and high."""
    figure, panels = plt.subplots(
        1, count, figsize=(width * count, height), layout="constrained", squeeze=False
    )
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[0]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole, and closes it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=140)
    plt.close(figure)
    write_whole(path, picture.getvalue())
