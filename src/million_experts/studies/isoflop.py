"""The isoFLOP study: at a fixed budget of training FLOPs, which feed-forward in the middle block learns most?

Sizes vary at each budget, steps = budget / FLOPs per step, as in the paper's Figure 1. Three phases, each
planned from the ledger of those before: a sweep of the learning rate, of the same size for every method, at
the smallest budget or at each; all sizes with the first seed; the other seeds at the best size. Choices are
made on the validation split.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from million_experts.lm.settings import RETRIEVAL_RATE, TABLE_RATE, TrainSettings
from million_experts.lm.training import model_config
from million_experts.models import count_parameters
from million_experts.studies.causality import measure_modes
from million_experts.studies.flops import training_flops_per_token
from million_experts.studies.runs import Ledger, Row, Run, check_runs_fit, execute, print_runs, training_steps

STUDY = "isoflop"
SWEEP, SIZES, SEEDS = "learning rates", "sizes", "seeds"  # the phases


@dataclass(frozen=True)
class Method:
    """A feed-forward of the middle block; the other blocks are dense.

    Attributes:
        kind: of `mlp_layer_types`.
        arguments: its arguments where they are not the layer's defaults.
        about: one line for the report.
        retrieval_rate: default learning rate of query projections and sub-keys over that of the rest.
    """

    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    retrieval_rate: float = RETRIEVAL_RATE


METHODS: dict[str, Method] = {
    "dense": Method("dense", about="a dense feed-forward with GELU, as in the other blocks"),
    "swiglu": Method("swiglu", about="a dense SwiGLU of as many parameters"),
    "moe": Method("moe", about="token-choice mixture as in Mixtral, SwiGLU experts, balancing loss"),
    "expert_choice": Method("expert_choice", about="expert-choice mixture, the paper's baseline"),
    # Memories have the rate of the rest: a lower one, as for PEER, did not help product-key memories.
    "pkm": Method("pkm", {"sparse_grad": True}, "product-key memory", retrieval_rate=1.0),
    "memory_plus": Method("memory_plus", {"sparse_grad": True}, "Memory+", retrieval_rate=1.0),
    "peer": Method("peer", {"sparse_grad": True}, "PEER"),
    "peer_shared": Method("peer", {"sparse_grad": True}, "PEER with a dense feed-forward beside it"),
}


def base_method(name: str) -> str:
    """The name in `METHODS` of a method or of a variant of it: "peer" of "peer:k64".

    A variant is a method with arguments of its own, whose rows stand beside those of others in one ledger.

    Raises:
        ValueError: the name of neither.
    """
    base, colon, variant = name.partition(":")
    if base not in METHODS or (colon and not re.fullmatch(r"[A-Za-z0-9_.]+", variant)):
        raise ValueError(
            f"methods must be of {', '.join(METHODS)}, or variants of them such as peer:k64 (letters, "
            f"digits, _ and . after a colon); got {name!r}"
        )
    return base


@dataclass(frozen=True)
class Size:
    """Width and depth of a model; the width decides on the heads."""

    hidden_size: int
    num_hidden_layers: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From "128x4", 4 blocks of width 128.

        Raises:
            ValueError: text of another form.
        """
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
        if match is None:
            raise ValueError(
                f"sizes must be WIDTHxBLOCKS with commas between, such as 64x3,128x4; got {text!r}"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def num_attention_heads(self) -> int:
        """As many heads of 64, in narrow models 32, as the width has room for."""
        wanted = max(1, self.hidden_size // (64 if self.hidden_size > 128 else 32))
        even = (heads for heads in range(wanted, 0, -1) if self.hidden_size % (2 * heads) == 0)
        return next(even, 1)

    def __str__(self) -> str:
        return f"{self.hidden_size}x{self.num_hidden_layers}"


# At least three blocks, so that the middle one has dense ones on both sides.
LADDER = tuple(
    map(
        Size.parse,
        "24x3 32x3 48x3 64x3 80x3 96x3 128x3 128x4 160x4 192x4 256x4 320x5 384x6 448x7 512x8 640x10 768x12 "
        "1024x16 1280x20 1536x24 2048x24".split(),
    )
)
# Tokens for each active parameter of the dense model: about 20 is best for large models, and a budget's sizes
# should lie on both sides of the best.
TOKENS_PER_PARAMETER = 5, 60


def by_budget(
    budgets: Sequence[float], sizes: Sequence[tuple[Size, ...]]
) -> tuple[Size, ...] | Mapping[float, tuple[Size, ...]] | None:
    """Sizes as `Options` has them, from none, one list for all budgets or one for each.

    Raises:
        ValueError: another number of lists.
    """
    if len(sizes) not in (0, 1, len(budgets)):
        raise ValueError(
            f"sizes must be given once for all budgets or once for each of the {len(budgets)}, got "
            f"{len(sizes)} lists"
        )
    if len(sizes) <= 1:
        return sizes[0] if sizes else None
    return dict(zip(budgets, sizes, strict=True))


@dataclass(frozen=True)
class Options:
    """What a study compares.

    Attributes:
        budgets: training FLOPs.
        methods: names in `METHODS`, or of variants of these.
        seeds: how many; they are 0, 1, ...
        sizes: of every budget, or of each; None chooses by budget.
        learning_rates: of the sweep.
        base: the settings that all runs share.
        arguments: name in `METHODS` -> arguments of its layer and its variants', in place of the defaults;
            those of "peer" hold for "peer_shared", too, and those of "dense" for the other blocks of every
            method.
        table_rate: learning rate of tables over that of the rest.
        retrieval_rate: that of query projections and sub-keys; None for each method's own.
        sweep_every_budget: a sweep of the learning rate at every budget, not at the smallest alone: longer
            training may want another rate.
        all_sizes: the other seeds at every size, not at the best alone.
    """

    budgets: tuple[float, ...]
    base: TrainSettings
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 3
    sizes: tuple[Size, ...] | Mapping[float, tuple[Size, ...]] | None = None
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    table_rate: float = TABLE_RATE
    retrieval_rate: float | None = None
    sweep_every_budget: bool = False
    all_sizes: bool = False

    def __post_init__(self) -> None:
        for name in ("budgets", "methods", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different values, got {values}")
        for name in ("budgets", "learning_rates"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} must be positive and finite, got {value}")
        bases = [base_method(method) for method in self.methods]
        if len(set(bases)) < len(bases):
            raise ValueError(
                "methods must not hold a method and a variant of it, or two variants, as they would have the "
                f"same arguments: give each a command of its own; got {', '.join(self.methods)}"
            )
        for method in self.arguments:
            if method not in METHODS:
                raise ValueError(f"arguments must be of {', '.join(METHODS)}; got those of {method!r}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        given = self.sizes.values() if isinstance(self.sizes, Mapping) else [self.sizes or ()]
        for sizes in given:
            if len(set(sizes)) < len(sizes):
                raise ValueError(f"sizes must be different, got {', '.join(map(str, sizes))}")
        for name in ("table_rate", "retrieval_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}")

    def sizes_at(self, budget: float) -> tuple[Size, ...]:
        """The sizes of a budget, by rising width."""
        given = self.sizes[budget] if isinstance(self.sizes, Mapping) else self.sizes
        if given is not None:
            return tuple(sorted(given, key=lambda size: (size.hidden_size, size.num_hidden_layers)))
        low, high = TOKENS_PER_PARAMETER
        ratios = {size: self._tokens_per_parameter(size, budget) for size in LADDER}
        fit = tuple(size for size, ratio in ratios.items() if low <= ratio <= high)
        if len(fit) >= 3:
            return fit
        near = sorted(LADDER, key=lambda size: abs(math.log(ratios[size] / math.sqrt(low * high))))[:3]
        return tuple(size for size in LADDER if size in near)

    def _tokens_per_parameter(self, size: Size, budget: float) -> float:
        config = model_config(self._settings("dense", size), self.base.vocab_size)
        tokens = budget / training_flops_per_token(config, self.base.context).total
        return tokens / count_parameters(config).active

    def _settings(self, method: str, size: Size) -> TrainSettings:
        method = base_method(method)
        kind, layers = METHODS[method].kind, size.num_hidden_layers
        given: dict[str, Any] = dict(METHODS[method].arguments)
        if method == "peer_shared":
            given = {"shared_width": 4 * size.hidden_size} | given | dict(self.arguments.get("peer", {}))
        given |= self.arguments.get(method, {})
        changes: dict[str, Any] = {"dense": dict(self.arguments.get("dense", {})), kind: given}
        return dataclasses.replace(
            self.base,
            hidden_size=size.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=size.num_attention_heads,
            mlp_layer_types=[kind if i == layers // 2 else "dense" for i in range(layers)],
            **changes,
        )

    def run(self, method: str, budget: float, size: Size, learning_rate: float, seed: int, phase: str) -> Run:
        """One run; its name says all but the phase, so phases share what they have in common.

        Raises:
            ValueError: the budget pays for too few steps.
        """
        settings = self._settings(method, size)
        retrieval_rate = self.retrieval_rate or METHODS[base_method(method)].retrieval_rate
        settings = dataclasses.replace(
            settings,
            steps=training_steps(budget, settings),
            learning_rate=learning_rate,
            table_learning_rate=self.table_rate * learning_rate,
            retrieval_learning_rate=retrieval_rate * learning_rate,
            seed=seed,
        )
        return Run(
            STUDY,
            f"{method}-{format_budget(budget)}-{size}-lr{learning_rate:g}-seed{seed}",
            settings,
            {
                "method": method,
                "budget": budget,
                "size": str(size),
                "learning_rate": learning_rate,
                "seed": seed,
                "phase": phase,
            },
        )


@dataclass(frozen=True)
class Plan:
    """A phase's runs, and how many will follow that depend on what they come to."""

    phase: str
    runs: list[Run]
    later: int
    later_flops: float


def plan(options: Options, ledger: Ledger) -> list[Plan]:
    """The phases as far as the ledger says what is in them; the last one may be unfinished.

    Raises:
        ValueError: a budget pays for too few steps of a size; every run that a choice is made among has
            diverged; the ledger has runs of these methods with other settings.
        MemoryError: a run is expected not to fit.
    """
    _check(options, ledger)
    done = {row["name"]: row for row in ledger.rows()}
    budgets, methods = sorted(options.budgets), options.methods
    sizes = {budget: options.sizes_at(budget) for budget in budgets}
    seeds = range(1, options.seeds)

    def sweep_at(method: str, budget: float) -> list[Run]:
        size = sizes[budget][len(sizes[budget]) // 2]
        return [options.run(method, budget, size, rate, 0, SWEEP) for rate in options.learning_rates]

    # A sweep that an earlier command has made holds as well, as it does in the report.
    sweep = {
        (method, budget): runs
        for budget in budgets
        for method in methods
        for runs in [sweep_at(method, budget)]
        if budget == budgets[0] or options.sweep_every_budget or all(run.name in done for run in runs)
    }
    sizes_later = {b: sum(len(sizes[b]) - ((method, b) in sweep) for method in methods) for b in budgets}
    seeds_later = {
        b: len(methods) * len(seeds) * (len(sizes[b]) if options.all_sizes else 1) for b in budgets
    }

    def later(*counts: dict[float, int]) -> tuple[int, float]:
        numbers = {b: sum(count[b] for count in counts) for b in budgets}
        return sum(numbers.values()), sum(b * number for b, number in numbers.items())

    plans = [Plan(SWEEP, _together(sweep.values()), *later(sizes_later, seeds_later))]
    if ledger.missing(plans[-1].runs):
        return plans

    best = {key: _best(runs, done).labels["learning_rate"] for key, runs in sweep.items()}
    rates = {(m, b): best.get((m, b), best[m, budgets[0]]) for b in budgets for m in methods}
    by_size = {
        (method, budget): [options.run(method, budget, size, rate, 0, SIZES) for size in sizes[budget]]
        for (method, budget), rate in rates.items()
    }
    plans.append(Plan(SIZES, _together(by_size.values()), *later(seeds_later)))
    if ledger.missing(plans[-1].runs):
        return plans

    chosen = {key: runs if options.all_sizes else [_best(runs, done)] for key, runs in by_size.items()}
    by_seed = [
        options.run(method, budget, Size.parse(run.labels["size"]), rates[method, budget], seed, SEEDS)
        for (method, budget), runs in chosen.items()
        for seed in seeds
        for run in runs
    ]
    return [*plans, Plan(SEEDS, by_seed, 0, 0.0)]


def _check(options: Options, ledger: Ledger) -> None:
    """Refuses before the first run what a later phase could not train, and rows that cannot be compared."""
    check_runs_fit(
        options.run(method, budget, size, options.learning_rates[0], 0, SIZES)
        for budget in options.budgets
        for size in options.sizes_at(budget)
        for method in options.methods
    )
    done = [row["labels"] for row in ledger.rows() if row["labels"]["method"] in options.methods]
    # Raises where a row is not what these options would make.
    ledger.missing([options.run(**{**labels, "size": Size.parse(labels["size"])}) for labels in done])


def _together(groups: Iterable[Sequence[Run]]) -> list[Run]:
    return [run for group in groups for run in group]


def validation_loss(row: Row) -> float:
    """In nats per token; infinite where training diverged."""
    return row["validation"]["loss"] if "validation" in row else math.inf


def _best(runs: Sequence[Run], done: Mapping[str, Row]) -> Run:
    best = min(runs, key=lambda run: validation_loss(done[run.name]))
    if validation_loss(done[best.name]) == math.inf:
        raise ValueError(
            f"all of {', '.join(run.name for run in runs)} have diverged, so there is no best: "
            "give lower --learning-rates and another --output"
        )
    return best


def run_study(options: Options, ledger: Ledger, console: Console, command: str = "") -> None:
    """Carries out all phases; runs that the ledger has are not repeated. Raises what `execute` raises."""
    finished: set[str] = set()
    while (current := plan(options, ledger)[-1]).phase not in finished:
        console.print(f"{current.phase}: {len(current.runs)} runs", style="bold", highlight=False)
        execute(current.runs, ledger, console, measure_modes, command, current.later_flops)
        finished.add(current.phase)


def print_plan(options: Options, ledger: Ledger, console: Console) -> None:
    """Prints the runs that are known so far and not done, and what all will take."""
    plans = plan(options, ledger)
    pending = {run.name: run for phase in plans for run in ledger.missing(phase.runs)}
    print_runs(list(pending.values()), ledger, console, plans[-1].later, plans[-1].later_flops)


def format_budget(budget: float) -> str:
    """As people write it: 2e13."""
    mantissa, _, exponent = f"{budget:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
