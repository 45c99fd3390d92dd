"""The report of the predecessor's tests: one table with its figures beside ours, differences, and curves."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps

from million_experts.lm.figures import panels_in_a_row, save_figure
from million_experts.studies.ostix360 import (
    BASELINE,
    PUBLISHED,
    PUBLISHED_MEMORY,
    PUBLISHED_TIME,
)
from million_experts.studies.runs import Row
from million_experts.studies.statistics import interval, paired_difference
from million_experts.studies.tables import (
    diverged_note,
    format_difference,
    format_interval,
    markdown_table,
    run_names,
)

FIGURE = "ostix360.png"
LAST = 10  # the "last-step loss" is the mean over the last of so many parts of the steps


def sections(rows: Sequence[Row], folder: Path) -> list[str]:
    """The parts of the report; its figure goes to `folder`."""
    tests: dict[str, list[Row]] = {}
    speeds: dict[str, Row] = {}
    for row in rows:
        if "speed" in row:
            speeds[row["labels"]["name"]] = row
        elif "validation" in row:
            tests.setdefault(row["labels"]["name"], []).append(row)
    names = sorted(tests, key=lambda name: (list(PUBLISHED).index(tests[name][0]["labels"]["test"]), name))
    if not names:
        return ["No run has been finished."]
    first = tests[names[0]][0]
    settings = first["settings"]
    learning_rates = sorted({row["settings"]["learning_rate"] for own in tests.values() for row in own})
    titles = _titles(names, tests)
    parts = [
        f"{settings['num_hidden_layers']} blocks of width {settings['hidden_size']}, all feed-forwards of "
        f"the same kind, vocabulary {settings['vocab_size']:,}, {first['steps']:,} steps of "
        f"{settings['batch_size']} x {settings['context']} tokens, learning rate "
        f"{' or '.join(f'{rate:g}' for rate in learning_rates)} with a {settings['lr_scheduler_type']} "
        "schedule, warm-up "
        f"{settings['warmup_steps']:g} (below 1 a share of the steps).{_scaled(first)} Losses are means "
        "over seeds with half of the 95 % interval, nats per token; the training losses are of the language "
        "model alone, without the router's balancing loss.",
        diverged_note(rows),
        "## Loss, time and memory",
        f"Losses of texts that were not trained on; a step's time and peak memory, each also as a ratio to "
        f"those of {BASELINE}. How they were taken and what the predecessor says of its own: further down. "
        "A dash: not measured.",
        _summary(titles, tests, speeds),
        *_variants(titles, tests),
        "## Training loss, beside the predecessor's",
        _training_losses(titles, tests),
        "## Differences from the baseline",
        "Paired by seed and order of data, negative is better than the baseline: mean and 95 % interval "
        "over n seeds. *Lower* and *higher* exclude 0, a *tie* does not, and one seed says nothing.",
        _differences(titles, tests),
    ]
    _figure(titles, tests, folder / FIGURE)
    parts += [
        "## Figure",
        f"![Training and validation loss of the tests]({FIGURE})\n\nCurves are means over seeds, after the "
        "first quarter of the steps, in the colours that the points have; points are runs.",
    ]
    timed = {name: title for name, title in titles.items() if name in speeds}
    if timed:
        parts += [
            "## How time and memory were taken",
            _speed_note([speeds[name] for name in timed]),
            _speed(timed, speeds),
        ]
    return parts


def _scaled(row: Row) -> str:
    """What a study that is smaller than the predecessor's cannot be compared by."""
    if row["settings"]["vocab_size"] == 32_000 and row["steps"] == 2_500:
        return ""
    return (
        " The predecessor had vocabulary 32,000 and 2,500 steps, so only differences between its tests can "
        "be compared with ours."
    )


def _titles(names: Iterable[str], tests: dict[str, list[Row]]) -> dict[str, str]:
    """What tables call each test, by its name; a variant's holds all its arguments, too long for a cell."""
    titles: dict[str, str] = {}
    variants: Counter[str] = Counter()
    for name in names:
        labels = tests[name][0]["labels"]
        titles[name] = test = labels["test"]
        if labels["variant"]:
            variants[test] += 1
            titles[name] = f"{test}, variant {variants[test]}"
    return titles


def _variants(titles: Mapping[str, str], tests: dict[str, list[Row]]) -> list[str]:
    """What variants change, where there are any."""
    changes = {title: tests[name][0]["labels"]["variant"] for name, title in titles.items()}
    lines = [f"- {title}: {variant.replace(',', ', ')}." for title, variant in changes.items() if variant]
    return ["Variants change:", "\n".join(lines)] if lines else []


def _summary(titles: Mapping[str, str], tests: dict[str, list[Row]], speeds: Mapping[str, Row]) -> str:
    """All that was measured of each test, a line each."""
    lines = []
    for name, title in titles.items():
        rows = tests[name]
        timed = [speeds[name]] if name in speeds else []
        lines.append(
            (
                title,
                _layer(rows[0]),
                f"{rows[0]['parameters']['total'] / 1e6:.2f}M",
                _mean(rows, _validation),
                *(_mean(rows, _test(text)) for text in _texts(tests)),
                *(_cost(timed[0]["speed"]) if timed else ["—"] * 4),
                run_names([*rows, *timed]),
            )
        )
    header = (
        "test", "layer", "parameters", "validation", *_texts(tests), "time of a step",
        "over the baseline", "peak memory", "over the baseline", "runs",
    )  # fmt: skip
    return markdown_table(header, lines, left=2)


def _cost(speed: Mapping[str, Any]) -> list[str]:
    """Time and memory of a step, each with its ratio to the baseline's."""
    time = [f"{1e3 * speed['seconds']['median']:.0f} ms", f"{speed['time_ratio']:.2f}"]
    if (peak := speed.get("peak_bytes")) is None:
        return [*time, "—", "—"]
    return [*time, f"{peak / 1e6:.0f} MB", f"{speed['memory_ratio']:.2f}"]


def _training_losses(titles: Mapping[str, str], tests: dict[str, list[Row]]) -> str:
    lines = []
    for name, title in titles.items():
        rows = tests[name]
        published = PUBLISHED[rows[0]["labels"]["test"]]
        variant = rows[0]["labels"]["variant"]
        lines.append(
            (
                title if variant else f"{title} ({published.title})",
                "" if variant else f"{published.parameters}M",
                *(
                    cell
                    for part, theirs in (
                        (_last, published.last_loss),
                        (_training, published.training_loss),
                    )
                    for cell in (_mean(rows, part), "" if variant else f"{theirs}")
                ),
                run_names(rows),
            )
        )
    header = (
        "test", "parameters there", f"last 1/{LAST} of the steps", "there, last step", "mean", "there",
        "runs",
    )  # fmt: skip
    return markdown_table(header, lines)


def _layer(row: Row) -> str:
    if row["labels"]["test"] == BASELINE:
        moe = row["settings"]["moe"]
        return f"{moe['experts_per_token']} of {moe['num_experts']} experts of width {moe['width']}"
    peer = row["settings"]["peer"]
    return f"{peer['num_heads']} x {peer['experts_per_head']} of {peer['num_experts']}"


def _differences(titles: Mapping[str, str], tests: dict[str, list[Row]]) -> str:
    baselines = [name for name in titles if tests[name][0]["labels"]["test"] == BASELINE]
    lines = []
    for baseline, name in itertools.product(baselines, titles):
        if name in baselines:
            continue
        cells = []
        for part in (_last, _training, _validation, *map(_test, _texts(tests))):
            ours, theirs = ({row["seed"]: part(row) for row in tests[n]} for n in (name, baseline))
            cells.append(format_difference(paired_difference(ours, theirs)))
        runs = run_names(tests[name]), run_names(tests[baseline])
        lines.append((f"{titles[name]} − {titles[baseline]}", *cells, *runs))
    header = (
        "", f"training, last 1/{LAST}", "training, mean", "validation", *_texts(tests), "runs", "baseline's",
    )  # fmt: skip
    return markdown_table(header, lines)


def _figure(titles: Mapping[str, str], tests: dict[str, list[Row]], path: Path) -> None:
    """Training loss over the steps, and validation loss of every run."""
    figure, (curves, points) = panels_in_a_row(2, width=5.5, height=1.6 + max(2.6, 0.3 * len(titles)))
    colours = colormaps["tab10" if len(titles) <= 10 else "tab20"]
    for place, (name, title) in enumerate(titles.items()):
        rows, colour = tests[name], colours(place % colours.N)
        dashed = "--" if rows[0]["labels"]["test"] == BASELINE else "-"
        shown = [
            (step, fmean(row["training_loss"][i][1] for row in rows))
            for i, (step, _) in enumerate(rows[0]["training_loss"])
            if step >= rows[0]["steps"] / 4
        ]
        curves.plot(*zip(*shown, strict=True), dashed, color=colour, linewidth=1.2)
        points.plot([_validation(row) for row in rows], [title] * len(rows), "o", color=colour, alpha=0.7)
    curves.set(xlabel="step", ylabel="training loss, nats per token")
    points.set(xlabel="validation loss, nats per token")
    points.invert_yaxis()  # in the order of the tables
    points.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def _speed_note(rows: Sequence[Row]) -> str:
    steps = " or ".join(f"{n}" for n in sorted({row["speed"]["seconds"]["repetitions"] for row in rows}))
    loads = [row["other_cores"] for row in rows]
    variants = any(row["labels"]["variant"] for row in rows)
    busy = " to ".join(dict.fromkeys(f"{load:.2f}" for load in (min(loads), max(loads))))
    apart = "Variants were timed by commands of their own, so each line has the baseline's median beside it. "
    return (
        "A training step: forward, backward, clipping and the optimiser, on new models and real text. Times "
        f"were taken in one process, the models in turns, {steps} steps of each after the training runs, "
        f"while others kept {busy} cores busy; medians and quartiles, and the median over rounds of the "
        f"ratio to the baseline's step of the same round. {apart if variants else ''}Memory is that of the "
        "weights and of the peak above them, optimiser state and gradients included, each model in a process "
        "of its own; the process itself (Python, PyTorch) is left out. The predecessor says of its layer "
        f"that it takes at least {PUBLISHED_TIME} times the time and {PUBLISHED_MEMORY} times the memory of "
        "the baseline."
    )


def _speed(titles: Mapping[str, str], speeds: dict[str, Row]) -> str:
    lines = []
    for name, title in titles.items():
        times = speeds[name]["speed"]["seconds"]
        baseline = speeds[name]["labels"]["test"] == BASELINE
        lines.append(
            (
                title,
                f"{1e3 * times['q1']:.0f} to {1e3 * times['q3']:.0f} ms",
                f"{1e3 * speeds[name]['baseline']['seconds']['median']:.0f} ms",
                "1" if baseline else f"at least {PUBLISHED_TIME}",
                "1" if baseline else f"at least {PUBLISHED_MEMORY}",
                run_names([speeds[name]]),
            )
        )
    header = (
        "test", "quartiles of its steps", "baseline's median", "time over the baseline, there",
        "memory over the baseline, there", "row",
    )  # fmt: skip
    return markdown_table(header, lines)


def _texts(tests: dict[str, list[Row]]) -> list[str]:
    return list(dict.fromkeys(text for rows in tests.values() for row in rows for text in row["tests"]))


def _last(row: Row) -> float:
    """Mean training loss over the last tenth of the steps."""
    return fmean(loss for step, loss in row["training_loss"] if step > row["steps"] * (1 - 1 / LAST))


def _training(row: Row) -> float:
    """Mean training loss over all steps that were logged."""
    return fmean(loss for _, loss in row["training_loss"])


def _validation(row: Row) -> float:
    return row["validation"]["loss"]


def _test(text: str):
    return lambda row: row["tests"][text]["loss"]


def _mean(rows: Iterable[Row], part) -> str:
    return format_interval(interval([part(row) for row in rows]))
