"""`million-experts study ablation`: one choice of the PEER layer at a time, at a fixed number of tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from million_experts.layers import ExpertUsage
from million_experts.layers.retrieval import QUERY_NORMS, SCORES, factorise
from million_experts.lm.callbacks import retrieval_layers
from million_experts.lm.packing import PackedBlocks
from million_experts.lm.scoring import evaluation_mode
from million_experts.lm.settings import TrainSettings
from million_experts.models import PeerForCausalLM
from million_experts.models.feed_forwards import complete_arguments
from million_experts.studies.causality import draw_batches, evaluate_modes, mean_loss
from million_experts.studies.runs import Measure, Run, training_steps, usage_figures
from million_experts.studies.texts import Texts

STUDY = "ablation"
POOLS = (128**2, 256**2, 512**2, 1024**2)
USAGE_TOKENS = 200_000
# Where in a stack of so many blocks the PEER layers stand.
PLACEMENTS: dict[str, Callable[[int], Sequence[int]]] = {
    "middle": lambda blocks: [blocks // 2],
    "all": range,
    "first": lambda blocks: [0],
    "last": lambda blocks: [blocks - 1],
}


FIXED = ("key_dim", "activation")  # arguments of the layer that no axis varies
# What of a setup is no argument of the layer.
TRAINING = ("placement", "table_rate", "table_beta1", "retrieval_rate")


@dataclass(frozen=True)
class Setup:
    """What a run trains, by all that the axes vary. Names are those of `PEER`'s arguments.

    Attributes:
        placement: one of `PLACEMENTS`; other blocks have dense feed-forwards.
        table_rate: the table's peak learning rate in multiples of the others'.
        table_beta1: AdamW's decay of the table's first moment.
        retrieval_rate: the peak learning rate of query projection and sub-keys in multiples of the others'.
    """

    num_experts: int
    num_heads: int
    experts_per_head: int
    query_norm: str
    share_keys: bool
    score: str
    glu: bool
    init_std: float
    shared_width: int
    placement: str
    table_rate: float
    table_beta1: float = 0.9  # what it was where rows of a ledger do not say it
    retrieval_rate: float = 1.0

    @classmethod
    def of(cls, settings: TrainSettings) -> Setup:
        """That of settings whose feed-forward in the middle is PEER."""
        arguments = complete_arguments("peer", settings.peer)
        arguments["num_experts"] = math.prod(factorise(arguments["num_experts"]))
        own = {f.name: arguments[f.name] for f in dataclasses.fields(cls) if f.name in arguments}
        table, retrieval = settings.peak_table_learning_rate, settings.peak_retrieval_learning_rate
        return cls(
            **own,
            placement="middle",
            table_rate=round(table / settings.learning_rate, 6),
            table_beta1=settings.table_adam_beta1,
            retrieval_rate=round(retrieval / settings.learning_rate, 6),
        )

    @property
    def active(self) -> int:
        """Experts that work on a token in a layer."""
        return self.num_heads * self.experts_per_head

    @property
    def exists(self) -> bool:
        """Whether a head can retrieve so many experts from the pool."""
        return 1 <= self.experts_per_head <= min(factorise(self.num_experts))

    def settings(self, base: TrainSettings) -> TrainSettings:
        """`base` with this layer; its gradients are sparse, as in the presets."""
        arguments = {name: value for name, value in dataclasses.asdict(self).items() if name not in TRAINING}
        kinds = ["dense"] * base.num_hidden_layers
        for block in PLACEMENTS[self.placement](base.num_hidden_layers):
            kinds[block] = "peer"
        return base.with_overrides(
            {
                "mlp_layer_types": kinds,
                "peer": {**arguments, "sparse_grad": True},
                "table_learning_rate": self.table_rate * base.learning_rate,
                "table_adam_beta1": self.table_beta1,
                "retrieval_learning_rate": self.retrieval_rate * base.learning_rate,
            }
        )

    def changes(self, base: Setup) -> str:
        """What differs from the base as `name=value,...`, or "base": the name of its runs."""
        pairs = zip(dataclasses.asdict(self).items(), dataclasses.asdict(base).values(), strict=True)
        return ",".join(f"{name}={own}" for (name, own), other in pairs if own != other) or "base"


@dataclass(frozen=True)
class Axis:
    """One question to the layer.

    Attributes:
        question: the heading of its table.
        setups: gives, for the base and the sizes of pools, what is compared; the base may be among them.
        note: what a reader of the table must know.
        reference: gives what a setup is compared with, for it and the base.
    """

    question: str
    setups: Callable[[Setup, Sequence[int]], Iterable[Setup]]
    note: str = ""
    reference: Callable[[Setup, Setup], Setup] = lambda setup, base: base


def _each(name: str, values: Iterable[Any]) -> Callable[[Setup, Sequence[int]], list[Setup]]:
    values = list(values)
    return lambda base, pools: [replace(base, **{name: value}) for value in values]


def _heads(base: Setup, pools: Sequence[int]) -> list[Setup]:
    counts = [heads for heads in (2, 4, 8, 16) if base.active % heads == 0]
    return [replace(base, num_heads=h, experts_per_head=base.active // h) for h in counts]


def _glu(base: Setup, pools: Sequence[int]) -> list[Setup]:
    share = 3 / 2 if base.glu else 2 / 3
    k = round(base.experts_per_head * share)
    return [base, replace(base, glu=not base.glu, experts_per_head=k)]


AXES = {
    "num_experts": Axis(
        "Number of experts", lambda base, pools: [replace(base, num_experts=pool) for pool in pools]
    ),
    "active": Axis("Experts at work on a token", _each("experts_per_head", (4, 8, 16, 32))),
    "heads": Axis("Heads against experts a head", _heads, "As many experts work on a token in every row."),
    "query_norm": Axis(
        "Query norm",
        lambda base, pools: [
            replace(base, num_experts=pool, query_norm=norm) for pool, norm in product(pools, QUERY_NORMS)
        ],
        "Differences are to the base's norm in a pool of the same size.",
        lambda setup, base: replace(setup, query_norm=base.query_norm),
    ),
    "share_keys": Axis("Keys shared by the heads, or of their own", _each("share_keys", (True, False))),
    "score": Axis("Score function", _each("score", SCORES)),
    "glu": Axis(
        "Gated experts",
        _glu,
        "A gated expert has three rows for two: a head retrieves 2/3 as many, to the nearest integer, so "
        "that about as many parameters are at work. The pool's number of experts is the same, its table "
        "half as large again.",
    ),
    "placement": Axis(
        "Blocks with a PEER layer", _each("placement", PLACEMENTS), "The other blocks' are dense."
    ),
    "table_rate": Axis(
        "Learning rate of the table, in multiples of the others'", _each("table_rate", (1.0, 2.0, 4.0, 8.0))
    ),
    "table_beta1": Axis("Momentum of the table: AdamW's first beta", _each("table_beta1", (0.0, 0.9))),
    "retrieval_rate": Axis(
        "Learning rate of query projection and sub-keys, in multiples of the others'",
        _each("retrieval_rate", (0.125, 0.25, 0.5, 1.0)),
    ),
    "init_std": Axis(
        "Standard deviation of the output at step 0", _each("init_std", (0.003, 0.01, 0.03, 0.1))
    ),
    "shared_width": Axis(
        "A dense branch beside the experts",
        _each("shared_width", (0, 256)),
        "Its neurons come on top: a step costs more.",
    ),
}


def ablation_runs(
    base: TrainSettings,
    axes: Iterable[str] = tuple(AXES),
    seeds: Iterable[int] = (0, 1, 2),
    pools: Sequence[int] = POOLS,
    budget: float | None = None,
) -> list[Run]:
    """The runs of some axes, seed by seed. What several axes ask for is trained once.

    Args:
        base: the training, and the layer that the axes vary in its `peer`.
        axes: names in `AXES`.
        seeds: of weights and order of the data.
        pools: numbers of experts of the axes `num_experts` and `query_norm`.
        budget: training FLOPs of a run, for steps in proportion; None for the base's number of steps.

    Raises:
        ValueError: an unknown axis, a pool that the base's heads cannot retrieve from, or a budget that pays
            for too few steps.
    """
    own = Setup.of(base)
    setups = [own]
    for name in axes:
        if name not in AXES:
            raise ValueError(f"axes must be among {', '.join(AXES)}, got {name!r}")
        setups += AXES[name].setups(own, pools)
    for name, pool in (("num_experts", own.num_experts), *(("pools", pool) for pool in pools)):
        if not replace(own, num_experts=pool).exists:
            raise ValueError(
                f"{name} must have codebooks of at least experts_per_head={own.experts_per_head} sub-keys, "
                f"got {pool} = {' * '.join(map(str, factorise(pool)))}"
            )
    runs = []
    # Numbers of experts a head that the pool cannot give are left out.
    distinct = [setup for setup in dict.fromkeys(setups) if setup.exists]
    for seed, setup in product(seeds, distinct):
        settings = replace(setup.settings(base), seed=seed)
        if budget is not None:
            settings = replace(settings, steps=training_steps(budget, settings))
        labels = {
            "variant": setup.changes(own),
            "setup": dataclasses.asdict(setup),
            "base": dataclasses.asdict(own),
        }
        runs.append(Run(STUDY, f"{labels['variant']}-seed{seed}", settings, labels, tests=False))
    return runs


def usage_and_modes(usage_tokens: int = USAGE_TOKENS) -> Measure:
    """What the study measures beside losses: expert usage over some validation tokens, and the modes.

    The tokens pass once; where the validation text is shorter, all of it does, and the row says how many.
    """

    def measure(run: Run, model: PeerForCausalLM, texts: Texts) -> dict[str, Any]:
        settings = run.settings
        blocks = PackedBlocks(texts.validation, settings.context, settings.document_mask)
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            usages = {
                name: stack.enter_context(ExpertUsage(layer))
                for name, layer in retrieval_layers(model).items()
            }
            mean_loss(model, draw_batches(blocks, settings.batch_size, usage_tokens))
        return {
            "usage": usage_figures(usages),
            **evaluate_modes(model, blocks, settings.batch_size, usage_tokens),
        }

    return measure
