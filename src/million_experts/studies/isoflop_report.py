"""The report of the isoFLOP study: which sizes were best, by how much methods differ, and its figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from million_experts.lm.figures import save_figure
from million_experts.models.feed_forwards import FEED_FORWARDS
from million_experts.studies.isoflop import METHODS, SWEEP, base_method, format_budget, validation_loss
from million_experts.studies.runs import Row
from million_experts.studies.statistics import Parabola, fit_parabola, interval, paired_difference
from million_experts.studies.tables import (
    MODES_NOTE,
    diverged_note,
    format_difference,
    format_interval,
    markdown_table,
    modes_table,
    run_names,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURE = "isoflop.png"
# Colour and marker, so that curves can be told apart without colour too.
STYLES = {
    "dense": ("#777777", "x"),
    "swiglu": ("#222222", "+"),
    "moe": ("#b03a48", "^"),
    "expert_choice": ("#e08a4c", "v"),
    "pkm": ("#3a9a5b", "D"),
    "memory_plus": ("#8e6bb0", "P"),
    "peer": ("#2a6fb0", "o"),
    "peer_shared": ("#5fb3d4", "s"),
}
OURS = ("peer", "peer_shared")
IN_DOMAIN = "in domain"  # the test texts of all corpora that were trained on, as one


def sections(rows: Sequence[Row], folder: Path) -> list[str]:
    """The parts of the report; its figure goes to `folder`."""
    study = _Study(rows)
    parts = [_methods(study), diverged_note(rows), "## Learning rates", _sweep(study)]
    if study.budgets:
        _figure(study, folder / FIGURE)
        parts += [
            "## Loss against size",
            f"![Validation loss against FLOPs per token]({FIGURE})",
            "Size is training FLOPs per token, all that a model computes; first seed, validation text. A "
            "curve is the parabola, over the logarithm of size, through the best size and those next to it, "
            "where they curve upwards, its star the minimum; dotted lines just join points.",
            _sizes(study),
            "## The best model of each method",
            "Its size was chosen by validation loss with the first seed. Means over seeds with half of the "
            "95 % interval (Student's t); perplexity is that of the mean. As a model is gone after its run, "
            "every run was scored on the test texts at its end; no choice has looked at them."
            + _in_domain_note(study),
            *(_best_models(study, budget) for budget in study.budgets),
        ]
        differences = [
            _differences(study, method, budget)
            for method in study.methods
            if base_method(method) in OURS
            for budget in study.budgets
        ]
        if any(differences):
            parts += [
                "## Differences",
                "Test loss of PEER minus that of another method, paired by seed and order of data: mean and "
                "95 % interval over n seeds. *Lower* and *higher* exclude 0, a *tie* does not, and one seed "
                "says nothing.",
                *differences,
            ]
        modes = modes_table(
            (f"{method}, {format_budget(budget)}", study.best(method, budget))
            for budget in study.budgets
            for method in study.methods
        )
        if modes:
            parts += ["## What training sees of the future", MODES_NOTE, modes]
    return parts


class _Study:
    """The rows by what they are for."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        names = dict.fromkeys(row["labels"]["method"] for row in rows)
        # Variants after the method itself, in the order of the ledger.
        self.methods = sorted(names, key=lambda name: (list(METHODS).index(base_method(name)), ":" in name))
        budgets = sorted({row["labels"]["budget"] for row in rows})
        # The runs that decide on a method's learning rate at a budget, and what they come to.
        self.sweeps = {
            (method, budget): found
            for budget in budgets
            for method in self.methods
            if (found := _swept(_of(rows, method=method, seed=0), budget))
        }
        self.rates = {
            (method, budget): best["labels"]["learning_rate"]
            for method in self.methods
            for budget in budgets
            if (best := _best(self._sweep_for(method, budget))) is not None
        }
        self.main = [
            row
            for row in rows
            if self.rates.get((row["labels"]["method"], row["labels"]["budget"]))
            == row["labels"]["learning_rate"]
        ]
        self.budgets = sorted({row["labels"]["budget"] for row in self.main})
        self.tests = list(dict.fromkeys(name for row in self.main for name in row.get("tests", {})))
        if any(len(_in_domain(row)) > 1 for row in self.main):
            self.tests.insert(0, IN_DOMAIN)

    def _sweep_for(self, method: str, budget: float) -> list[Row]:
        """The sweep that holds at a budget: its own, else that of the smallest."""
        first = (sweep for (swept, _), sweep in self.sweeps.items() if swept == method)
        return self.sweeps.get((method, budget)) or next(first, [])

    def first_seed(self, method: str, budget: float) -> list[Row]:
        """The runs of all sizes with the first seed, by rising size."""
        rows = _of(self.main, method=method, budget=budget, seed=0)
        return sorted(rows, key=lambda row: row["flops"]["per_token"])

    def best(self, method: str, budget: float) -> list[Row]:
        """The runs of the best size, of all seeds that did not diverge."""
        best = _best(self.first_seed(method, budget))
        if best is None:
            return []
        rows = _of(self.main, method=method, budget=budget, size=best["labels"]["size"])
        return sorted((row for row in rows if "tests" in row), key=lambda row: row["seed"])


def _swept(rows: Sequence[Row], budget: float) -> list[Row]:
    """The sweep of a method's learning rate at a budget: the runs of the size at which most rates were tried.

    A single rate decides nothing at a larger budget than the smallest, of which there may be later commands
    with a rate and a size of their own.
    """
    smallest = min((row["labels"]["budget"] for row in _of(rows, phase=SWEEP)), default=None)
    rows = _of(rows, budget=budget, **({"phase": SWEEP} if budget == smallest else {}))
    groups = [_of(rows, size=size) for size in dict.fromkeys(row["labels"]["size"] for row in rows)]
    largest = max(groups, key=len, default=[])
    return largest if budget == smallest or len(largest) > 1 else []


def _of(rows: Iterable[Row], **labels: Any) -> list[Row]:
    return [row for row in rows if all(row["labels"][name] == value for name, value in labels.items())]


def _best(rows: Sequence[Row]) -> Row | None:
    """The row of the lowest validation loss; None where there is none or all diverged."""
    best = min(rows, key=validation_loss, default=None)
    return None if best is None or math.isinf(validation_loss(best)) else best


def _in_domain(row: Row) -> list[dict[str, float]]:
    """What a run found on the test texts of the corpora that it was trained on."""
    return [found for name, found in row.get("tests", {}).items() if name in row["settings"]["data"]]


def _test(row: Row, test: str, figure: str = "loss") -> float:
    """A figure of a test text, or of those in domain as one text: its mean over their tokens, or bytes."""
    if test != IN_DOMAIN:
        return row["tests"][test][figure]
    unit = {"loss": "tokens", "bits_per_byte": "bytes"}[figure]
    texts = _in_domain(row)
    return sum(text[figure] * text[unit] for text in texts) / sum(text[unit] for text in texts)


def _in_domain_note(study: _Study) -> str:
    if IN_DOMAIN not in study.tests:
        return ""
    names = [name for name in study.tests if name in study.main[0]["settings"]["data"]]
    return f" *{IN_DOMAIN.capitalize()}* is the test text of what was trained on as one: {', '.join(names)}."


def _methods(study: _Study) -> str:
    lines = []
    for method in study.methods:
        row = _of(study.rows, method=method)[0]
        about = METHODS[base_method(method)]
        arguments = ", ".join(f"{name}={value}" for name, value in row["settings"][about.kind].items())
        lines.append((method, about.about, arguments))
    text = "Only the middle block differs between methods:"
    return text + "\n\n" + markdown_table(("method", "middle block", "arguments"), lines, left=3)


def _sweep(study: _Study) -> str:
    """A table of the learning rates for each budget that has a sweep."""
    parts, edges = [], []
    for budget in dict.fromkeys(budget for _, budget in study.sweeps):
        sweeps = {method: rows for (method, swept), rows in study.sweeps.items() if swept == budget}
        rates = sorted({row["labels"]["learning_rate"] for rows in sweeps.values() for row in rows})
        lines = []
        for method, rows in sweeps.items():
            best = study.rates.get((method, budget))
            cells = []
            for rate in rates:
                found = _of(rows, learning_rate=rate)
                cells.append(_loss(found[0], best == rate) if found else "—")
            lines.append((method, rows[0]["labels"]["size"], *cells, run_names(rows)))
            tried = [row["labels"]["learning_rate"] for row in rows]
            if len(tried) > 1 and best in (min(tried), max(tried)):
                edges.append(f"{method} at {format_budget(budget)}")
        header = ("method", "size", *(f"{rate:g}" for rate in rates), "runs")
        parts.append(f"Validation loss at {format_budget(budget)} FLOPs:\n\n" + markdown_table(header, lines))
    if not parts:
        return ""
    every = [row for rows in study.sweeps.values() for row in rows]
    note = (
        "First seed; the best, in bold, is used from there on. Where a method has no sweep of its own at a "
        f"budget, the rate of the smallest one holds.{_other_rates(every)}"
    )
    if edges:
        parts.append(f"At the edge of the sweep, where a rate beyond might do better: {', '.join(edges)}.")
    return "\n\n".join([note, *parts])


def _loss(row: Row, bold: bool = False) -> str:
    loss = validation_loss(row)
    text = row["status"] if math.isinf(loss) else f"{loss:.4f}"
    return f"**{text}**" if bold else text


def _sizes(study: _Study) -> str:
    """Each method's sizes with the first seed, and the minimum of the parabola."""
    lines, edges = [], []
    for budget in study.budgets:
        for method in study.methods:
            rows = study.first_seed(method, budget)
            if not rows:
                continue
            best = _best(rows)
            if len(rows) > 1 and best in (rows[0], rows[-1]):
                edges.append(f"{method} at {format_budget(budget)}")
            curve = _parabola(rows)
            minimum = "—"
            if curve is not None:
                minimum = f"{curve.bottom:.4f} at {curve.best:.3g} FLOPs a token"
                minimum += "" if curve.inside else ", beyond the sizes"
            cells = "; ".join(f"{row['labels']['size']}: {_loss(row, row is best)}" for row in rows)
            lines.append((format_budget(budget), method, cells, minimum, run_names(rows)))
    header = ("budget", "method", "size: validation loss", "minimum of the parabola", "runs")
    table = markdown_table(header, lines, left=5)
    if not edges:
        return table
    return f"{table}\n\nAt the edge of the sizes, where one beyond might do better: {', '.join(edges)}."


def _parabola(rows: Sequence[Row]) -> Parabola | None:
    """Of the best size and its neighbours: far from the minimum losses are no parabola."""
    trained = [row for row in rows if not math.isinf(validation_loss(row))]
    losses = list(map(validation_loss, trained))
    if not losses:
        return None
    first = min(max(losses.index(min(losses)) - 1, 0), max(len(losses) - 3, 0))
    near = slice(first, first + 3)
    return fit_parabola([row["flops"]["per_token"] for row in trained[near]], losses[near])


def _other_rates(sweep: Sequence[Row]) -> str:
    """What learns at another rate than the rest, or otherwise; rows of an older release may not say all."""
    routed = {
        row["labels"]["method"]: row["settings"]
        for row in sweep
        if FEED_FORWARDS[METHODS[base_method(row["labels"]["method"])].kind].is_routed
    }
    if not routed:
        return ""

    def rates(name: str) -> str:
        """The rate where all methods have the same, else each with its methods: "0.25 (peer) and 1 (pkm)"."""
        methods: dict[float, list[str]] = {}
        for method, settings in routed.items():
            rate = round(settings.get(name, settings["learning_rate"]) / settings["learning_rate"], 6)
            methods.setdefault(rate, []).append(method)
        if len(methods) == 1:
            return f"{next(iter(methods)):g}"
        return " and ".join(f"{rate:g} ({', '.join(methods[rate])})" for rate in sorted(methods))

    momentum = ", without momentum" if all(s.get("table_adam_beta1") == 0 for s in routed.values()) else ""
    return (
        f" Tables learn at {rates('table_learning_rate')} times the rate{momentum}; query projections and "
        f"sub-keys at {rates('retrieval_learning_rate')} times."
    )


def _best_models(study: _Study, budget: float) -> str:
    parts = [f"### {format_budget(budget)} FLOPs"]
    lines: list[tuple[str, ...]] = []
    for method in study.methods:
        for row in study.best(method, budget)[:1]:
            lines.append(
                (
                    method,
                    row["labels"]["size"],
                    row["parameters"]["label"],
                    f"{row['flops']['per_token'] / 1e6:.2f}M",
                    f"{row['tokens'] / 1e6:.2f}M",
                    f"{row['labels']['learning_rate']:g}",
                    _usage(row),
                    run_names([row]),
                )
            )
    header = (
        "method", "size", "parameters", "FLOPs a token", "tokens", "learning rate", "experts used",
        "run of the first seed",
    )  # fmt: skip
    parts.append(markdown_table(header, lines))
    for test in study.tests:
        lines = []
        for method in study.methods:
            rows = study.best(method, budget)
            if rows:
                loss = interval([_test(row, test) for row in rows])
                bits = interval([_test(row, test, "bits_per_byte") for row in rows])
                perplexity = f"{math.exp(loss.mean):.2f}"
                numbers = format_interval(loss, 4), perplexity, format_interval(bits, 4), str(loss.n)
                lines.append((method, *numbers, run_names(rows)))
        columns = ("method", "nats per token", "perplexity", "bits per byte", "n", "runs")
        parts.append(f"Test text {test}:\n\n{markdown_table(columns, lines)}")
    return "\n\n".join(parts)


def _usage(row: Row) -> str:
    return ", ".join(f"{figures['usage']:.1%}" for figures in row["expert_usage"].values()) or "—"


def _differences(study: _Study, ours: str, budget: float) -> str:
    """Of one of our methods to all others at a budget; empty where there is nothing to compare."""
    mine = study.best(ours, budget)
    lines = []
    for method in study.methods:
        theirs = study.best(method, budget)
        if method != ours and mine and theirs:
            cells = [
                format_difference(paired_difference(_by_seed(mine, test), _by_seed(theirs, test)))
                for test in study.tests
            ]
            lines.append((f"{ours} − {method}", *cells, run_names(theirs)))
    if not lines:
        return ""
    header = ("", *(f"{test}, nats" for test in study.tests), "runs of the other")
    return f"### {ours}, {format_budget(budget)} FLOPs\n\nIts runs: {run_names(mine)}\n\n" + markdown_table(
        header, lines
    )


def _by_seed(rows: Iterable[Row], test: str) -> dict[int, float]:
    return {row["seed"]: _test(row, test) for row in rows}


def _figure(study: _Study, path: Path) -> None:
    figure, panels = plt.subplots(
        1,
        len(study.budgets),
        figsize=(1.6 + 4.6 * len(study.budgets), 4.4),
        layout="constrained",
        squeeze=False,
    )
    for axes, budget in zip(panels[0], study.budgets, strict=True):
        for method in study.methods:
            rows = [row for row in study.first_seed(method, budget) if "validation" in row]
            if not rows:
                continue
            base = base_method(method)
            color, marker = STYLES[base]
            width = 2.0 if base in OURS else 1.2
            fill, line = ("none", "-") if method == base else (color, "--")  # filled and dashed: a variant
            sizes, losses = [row["flops"]["per_token"] for row in rows], list(map(validation_loss, rows))
            axes.plot(sizes, losses, marker, color=color, ms=6, mfc=fill, label=method)
            curve = _parabola(rows)
            low, high = (math.inf, math.inf) if curve is None else curve.range
            for part in ([size <= low for size in sizes], [size >= high for size in sizes]):
                axes.plot(np.compress(part, sizes), np.compress(part, losses), ":", color=color, lw=width)
            if curve is None:
                continue
            x = np.geomspace(*curve.range, 100)
            axes.plot(x, [curve(size) for size in x], line, color=color, lw=width)
            if curve.inside:
                axes.plot([curve.best], [curve.bottom], "*", color=color, ms=10)
        axes.set(xscale="log", xlabel="training FLOPs per token", title=f"{format_budget(budget)} FLOPs")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("validation loss, nats per token")
    handles = {
        label: handle
        for axes in panels[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    shown = [method for method in study.methods if method in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside right center", frameon=False)
    save_figure(figure, path)
