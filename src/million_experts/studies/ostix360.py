"""`million-experts study ostix360`: the three tests of the predecessor, its figures beside ours.

In every block of a small decoder stands PEER without GLU, PEER with GLU, or Mixtral's mixture of experts, the
baseline, with equal numbers of parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from million_experts.benchmarks.machine import OtherLoad, describe
from million_experts.layers.retrieval import factorise
from million_experts.lm.settings import TABLE_SETTINGS, TrainSettings, load_preset
from million_experts.lm.training import model_config
from million_experts.models import count_parameters
from million_experts.models.feed_forwards import complete_arguments
from million_experts.studies.runs import (
    Ledger,
    Run,
    execute,
    resolved_precision,
    stored_settings,
    training_steps,
)
from million_experts.studies.speed import REPETITIONS, compare_steps
from million_experts.studies.texts import load_texts

STUDY = "ostix360"
BASELINE = "moe"
MEASURED = "measured"  # the status of a row of times
PRESETS = {"peer": "ostix360-test1", "peer_glu": "ostix360-test2", BASELINE: "ostix360-test3"}
WARM_UP = 500 / 2500  # of the steps, there
MOST_DIFFERENCE = 0.02  # between the tests' numbers of parameters
_RATES = ("table_learning_rate", "retrieval_learning_rate")  # there all learn at one rate


@dataclass(frozen=True)
class Published:
    """What the predecessor's own table says of a test.

    Attributes:
        title: of the test.
        parameters: millions.
        last_loss, training_loss: of the last step, and the mean over all, nats per token.
    """

    title: str
    parameters: float
    last_loss: float
    training_loss: float


PUBLISHED = {
    "peer": Published("1: PEER, 8 x 30 of 36^2", 22.2, 4.58, 5.42),
    "peer_glu": Published("2: PEER with GLU, 8 x 26 of 30^2", 22.3, 4.53, 5.34),
    BASELINE: Published("3, baseline: Mixtral's, 2 of 4", 22.0, 4.49, 5.35),
}
# The predecessor's own words about PEER over its baseline: "at least".
PUBLISHED_TIME, PUBLISHED_MEMORY = 7, 3


def choose_tests(
    changes: Mapping[str, Any] | None = None,
    peer: Mapping[str, Any] | None = None,
    tests: Iterable[str] = tuple(PRESETS),
    budget: float | None = None,
    learning_rate: float | None = None,
) -> dict[str, TrainSettings]:
    """The settings of the tests, whose presets they are but for what is given.

    Args:
        changes: settings in place of the presets'. With `steps`, the warm-up is in proportion.
        peer: arguments of the PEER layers in place of the presets', and `TABLE_SETTINGS`.
        tests: names in `PRESETS`.
        budget: training FLOPs of the baseline, in place of a number of steps: all tests take as many steps.
        learning_rate: the peak of all tests, for tables and retrieval as well unless `peer` has theirs; None
            for the presets'.

    With another vocabulary or arguments of PEER but `num_experts`, the pools are the squares that bring the
    models nearest to the baseline's number of parameters.

    Raises:
        ValueError: an unknown test, an argument that PEER has not, models whose numbers of parameters
            differ by more than 2 %, or a budget that pays for too few steps.
    """
    changes, arguments = dict(changes or {}), dict(peer or {})
    baseline = replace(load_preset(PRESETS[BASELINE]), **changes)
    if budget is not None:
        changes["steps"] = training_steps(budget, baseline)
    if "steps" in changes:
        changes["warmup_steps"] = WARM_UP
    training = {name: arguments.pop(name) for name in TABLE_SETTINGS if name in arguments}
    if learning_rate is not None:
        changes["learning_rate"] = learning_rate
        training = dict.fromkeys(_RATES, learning_rate) | training
    try:
        complete_arguments("peer", arguments)
    except ValueError as error:
        raise ValueError(f"{error}, and of training {', '.join(TABLE_SETTINGS)}") from error
    target = parameters(baseline)
    selected = {}
    for name in tests:
        if name not in PRESETS:
            raise ValueError(f"tests must be among {', '.join(PRESETS)}, got {name!r}")
        settings = replace(load_preset(PRESETS[name]), **changes)
        if name != BASELINE:
            settings = replace(settings.with_overrides({"peer": arguments}), **training)
            if ("vocab_size" in changes or arguments) and "num_experts" not in arguments:
                settings = _with_pool_for(settings, target)
        own = parameters(settings)
        if abs(own / target - 1) > MOST_DIFFERENCE:
            raise ValueError(
                f"{name} must have the baseline's {target:,} parameters within {MOST_DIFFERENCE:.0%}, got "
                f"{own:,}: give other --peer arguments, or leave num_experts out to have it chosen"
            )
        selected[name] = settings
    return selected


def parameters(settings: TrainSettings) -> int:
    """Of the whole model."""
    return count_parameters(model_config(settings, settings.vocab_size)).total


def _with_pool_for(settings: TrainSettings, target: int) -> TrainSettings:
    """The settings with the square pool whose model comes nearest to a number of parameters."""
    arguments = complete_arguments("peer", settings.peer)
    smallest = arguments["experts_per_head"]

    def sized(side: int) -> TrainSettings:
        return settings.with_overrides({"peer": {"num_experts": side**2}})

    def distance(side: int) -> int:
        return abs(parameters(sized(side)) - target)

    side = max(smallest, math.isqrt(math.prod(factorise(arguments["num_experts"]))))
    step = 1 if parameters(sized(side)) < target else -1
    while side + step >= smallest and distance(side + step) < distance(side):
        side += step
    return sized(side)


def name_variants(peer: Mapping[str, Any], learning_rate: float | None = None) -> dict[str, str]:
    """What such arguments of `choose_tests` change in each test, as `name=value,...`; "" for nothing."""
    rate = {} if learning_rate is None else {"learning_rate": learning_rate}
    changes = {test: rate if test == BASELINE else {**rate, **peer} for test in PRESETS}
    return {test: ",".join(f"{name}={value}" for name, value in own.items()) for test, own in changes.items()}


def ostix360_runs(
    tests: Mapping[str, TrainSettings],
    seeds: Iterable[int] = (0, 1, 2),
    variants: Mapping[str, str] | None = None,
) -> list[Run]:
    """The runs of the tests, seed by seed.

    Args:
        tests: of `choose_tests`.
        variants: of `name_variants`; None for the tests as they are.
    """
    return [
        Run(STUDY, f"{labels['name']}-seed{seed}", replace(settings, seed=seed), labels)
        for seed in seeds
        for test, settings in tests.items()
        for labels in [_labels(test, variants)]
    ]


def speed_runs(tests: Mapping[str, TrainSettings], variants: Mapping[str, str] | None = None) -> list[Run]:
    """What is timed: a row each, under names of their own."""
    return [
        Run(STUDY, f"{labels['name']}-speed", replace(settings, seed=0), labels)
        for test, settings in tests.items()
        for labels in [_labels(test, variants)]
    ]


def run_study(
    tests: Mapping[str, TrainSettings],
    seeds: Iterable[int],
    ledger: Ledger,
    console: Console,
    variants: Mapping[str, str] | None = None,
    command: str = "",
    timed_steps: int = REPETITIONS,
) -> None:
    """Trains what the ledger does not have, then times what it has no times of.

    Times are compared with the baseline's, which are taken beside them: without it, or with it alone, none
    are taken. Raises what `execute` raises; times that an interruption leaves unfinished are taken again.
    """
    execute(ostix360_runs(tests, seeds, variants), ledger, console, command=command)
    runs = speed_runs(tests, variants)
    pending = ledger.missing(runs)
    baseline = next((run for run in runs if run.labels["test"] == BASELINE), None)
    if not pending:
        return
    if baseline is None or len(runs) < 2:
        console.print(f"No times: they are taken beside those of {BASELINE}, so name it and another test.")
        return
    compared = [baseline, *(run for run in pending if run is not baseline)]
    texts = load_texts(baseline.settings)
    try:
        with OtherLoad() as load:
            figures = compare_steps(
                {run.name: run.settings for run in compared}, texts.train, console, timed_steps
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Stopped while steps were timed. The training runs are in {ledger.path}; the same command goes "
            "on with the times."
        ) from None
    for run in pending:
        row = {
            "study": STUDY,
            "name": run.name,
            "status": MEASURED,
            "labels": run.labels,
            "settings": stored_settings(run.settings),
            "parameters": dataclasses.asdict(count_parameters(run.config)),
            "precision": resolved_precision(run.settings),
            "speed": figures[run.name],
            "baseline": figures[baseline.name],
            "other_cores": round(load.cores, 3),
            "command": command,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            **describe(),
        }
        ledger.append(row)


def _labels(test: str, variants: Mapping[str, str] | None) -> dict[str, Any]:
    variant = (variants or {}).get(test, "")
    return {
        "test": test,
        "variant": variant,
        "method": test,
        "name": f"{test}({variant})" if variant else test,
    }
