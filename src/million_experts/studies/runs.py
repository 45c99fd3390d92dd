"""The runs of a study: what each trains, the ledger of those that are done, and how they are carried out."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from million_experts.benchmarks.machine import describe
from million_experts.benchmarks.memory import can_measure, release_kept, reset_peak, resident_bytes
from million_experts.layers import ExpertUsage
from million_experts.lm.callbacks import retrieval_layers
from million_experts.lm.files import explained
from million_experts.lm.memory import takes_bfloat16
from million_experts.lm.scoring import Score, score_documents
from million_experts.lm.settings import FREE_ON_RESUME, TABLE_SETTINGS, TrainSettings
from million_experts.lm.training import build_model, check_memory, fit, model_config
from million_experts.models import PeerConfig, PeerForCausalLM, count_parameters
from million_experts.models.feed_forwards import FEED_FORWARDS
from million_experts.studies.flops import training_flops_per_token
from million_experts.studies.progress import Pace, StudyProgress, format_duration
from million_experts.studies.texts import Texts, load_texts, texts_key

Row = dict[str, Any]
LEAST_STEPS = 10  # of a run: with fewer, warm-up and decay of the learning rate are nothing but rounding
FINISHED, DIVERGED = "finished", "diverged"
# What a run learns does not depend on these.
_FREE = FREE_ON_RESUME | {"prompt"}


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        study: the study it belongs to.
        name: unique within the study.
        settings: what is trained. The texts are split by `texts.SPLIT_SEED`, whatever `seed` they have.
        labels: by which tables and figures group rows.
        tests: whether the trained model is scored on the test texts, beside the validation text. Studies
            that only choose leave them alone.
    """

    study: str
    name: str
    settings: TrainSettings
    labels: dict[str, Any] = field(default_factory=dict)
    tests: bool = True

    @cached_property
    def config(self) -> PeerConfig:
        """The model's; it has `vocab_size` tokens even if the text is too small to give that many."""
        return model_config(self.settings, self.settings.vocab_size)

    @cached_property
    def flops(self) -> float:
        """Training FLOPs of all steps."""
        per_token = training_flops_per_token(self.config, self.settings.context).total
        return per_token * self.settings.tokens_per_step() * self.settings.steps


# Further figures of a trained model, for the row of its run.
Measure = Callable[[Run, PeerForCausalLM, Texts], Mapping[str, Any]]


def training_steps(budget: float, settings: TrainSettings) -> int:
    """Steps that `budget` training FLOPs of the settings' model pay for, rounded down.

    Raises:
        ValueError: fewer than `LEAST_STEPS`, where the budget that would do is named; or no number of FLOPs.
    """
    if not math.isfinite(budget):
        raise ValueError(f"budget must be finite, got {budget}")
    config = model_config(settings, settings.vocab_size)
    step = training_flops_per_token(config, settings.context).total * settings.tokens_per_step()
    if budget < LEAST_STEPS * step:
        raise ValueError(
            f"budget must pay for {LEAST_STEPS} steps at least, got {budget:g} FLOPs, which are "
            f"{budget / step:.1f} steps of hidden_size={config.hidden_size} with "
            f"{config.num_hidden_layers} blocks: {LEAST_STEPS * step:.2g} FLOPs would do, or a smaller "
            "model, or fewer tokens a step (--batch-size)"
        )
    return int(budget / step)


class Ledger:
    """The finished runs of a study: a JSON row each, one a line, in the order in which they ended.

    A line is written to the disk before the next run begins. What a dying process has left of a last line is
    ignored and overwritten.
    """

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[Row]:
        """All rows.

        Raises:
            ValueError: a line other than a torn last one is damaged.
        """
        text = self._read()
        found: list[Row] = []
        for number, line in enumerate(text[: _whole(text)].splitlines(), 1):
            try:
                row = json.loads(line)
                found.append({key: row[key] for key in ("name", "status", "settings")} | row)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"line {number} of {self.path} is no row of a study: {error!r}") from error
        return found

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that are not done; a run is if a row has its name and its settings.

        Raises:
            ValueError: the row of a run's name has other settings; the differences are named.
        """
        rows = {row["name"]: row for row in self.rows()}
        for run in (run for run in runs if run.name in rows):
            if different := differences(run, rows[run.name]):
                raise ValueError(
                    f"the run {run.name} in {self.path} was made with other settings: "
                    f"{'; '.join(different)}. Give the options it was made with, or another --output for a "
                    "new study"
                )
        return [run for run in runs if run.name not in rows]

    def append(self, row: Row) -> None:
        """Adds a row and sees it onto the disk. Other processes may add theirs meanwhile.

        Raises:
            ValueError: there is a row of its name.
            WriteError: it could not be written.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        if any(other["name"] == row["name"] for other in self.rows()):
            raise ValueError(
                f"{self.path} has a row of {row['name']} already, and keeps it: another process has done the "
                "same run. Give processes that share a ledger different runs"
            )
        with explained(self.path.name, self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # With room for all of it the line is one write, which the system puts behind those of others.
            with open(self.path, "ab", buffering=len(line) + 1) as file:
                text = self._read()
                if _whole(text) < len(text):
                    file.truncate(_whole(text))
                file.write(line)
                file.flush()
                os.fsync(file.fileno())

    def _read(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""


def _whole(text: bytes) -> int:
    """How many bytes whole lines take, without what is left of a last one."""
    return text.rfind(b"\n") + 1


def resolved_precision(settings: TrainSettings) -> str:
    """What "auto" comes to on this machine. Runs of one study are compared, so they should have the same."""
    return "bfloat16" if takes_bfloat16(settings.precision) else "float32"


def stored_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide what a run learns, as JSON holds them; defaults of layers are written out.

    A row keeps its meaning, and is not taken for that of a run with other defaults, when those change.
    """
    config = model_config(settings, settings.vocab_size)
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _FREE}
    values["mlp_layer_types"] = config.mlp_layer_types
    values["num_key_value_heads"] = config.num_key_value_heads
    values["precision"] = resolved_precision(settings)
    values["table_learning_rate"] = settings.peak_table_learning_rate
    values["retrieval_learning_rate"] = settings.peak_retrieval_learning_rate
    for kind in FEED_FORWARDS:
        arguments = getattr(config, kind) if kind in (config.mlp_layer_types or []) else {}
        values[kind] = {name: value for name, value in arguments.items() if name != "backend"}
    if not any(FEED_FORWARDS[kind].is_routed for kind in config.mlp_layer_types or []):
        values = {name: value for name, value in values.items() if name not in TABLE_SETTINGS}
    return json.loads(json.dumps(values))


def differences(run: Run, row: Row) -> list[str]:
    """Lines "name: the run's, not the row's" for settings in which they differ."""
    # Through TrainSettings, so that what has been added since then has its default in old rows.
    settings = TrainSettings.from_dict(row["settings"], f"the run {row['name']}")
    # Older rows' settings may have "auto", which was resolved on another machine.
    before = _flat(stored_settings(settings) | {"precision": row["precision"]})
    now = _flat(stored_settings(run.settings))
    return [
        f"{name}: {now.get(name)!r}, not {before.get(name)!r}"
        for name in now | before
        if now.get(name) != before.get(name)
    ]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def execute(
    runs: Sequence[Run],
    ledger: Ledger,
    console: Console,
    measure: Measure | None = None,
    command: str = "",
    later_flops: float = 0.0,
) -> None:
    """Trains and measures the runs that the ledger does not have, one after the other in this process.

    A run whose loss is no longer finite gets a row with the status "diverged", and the study goes on.

    Args:
        measure: gives further figures of a trained model, kept under "measured" in its row.
        command: what the user typed, kept in the rows.
        later_flops: of runs that will follow in other calls, for the time left.

    Raises:
        ValueError: two runs of one name; a row of the ledger with a run's name and other settings; text that
            does not suit or is not that of earlier rows.
        MemoryError: a run is expected not to fit; nothing has been trained then.
        WriteError: a row could not be written.
        KeyboardInterrupt: with what to do to go on; the run under way is lost, the finished ones are not.
    """
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("the names of a study's runs must be unique")
    pending = ledger.missing(runs)
    check_runs_fit(pending)
    if not pending:
        return
    machine = describe()
    pace = Pace(ledger.rows(), machine, pending[0].settings)
    texts: Texts | None = None
    key: tuple[Any, ...] = ()
    with StudyProgress(console, pending, pace, later_flops) as progress:
        try:
            for run in pending:
                if texts is None or texts_key(run.settings) != key:
                    progress.say("reading and tokenising the texts")
                    texts, key = load_texts(run.settings), texts_key(run.settings)
                    _recognise(run, texts, ledger)
                progress.begin(run)
                row = {
                    "study": run.study,
                    "name": run.name,
                    **train_and_measure(run, texts, measure, [progress.callback]),
                    "command": command,
                    "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                    **machine,
                }
                ledger.append(row)
                progress.end(run, row)
        except KeyboardInterrupt:
            done = len(runs) - len(ledger.missing(runs))
            raise KeyboardInterrupt(
                f"Stopped with {done} of {len(runs)} runs in {ledger.path}; the same command goes on with "
                "the others."
            ) from None


def check_runs_fit(runs: Iterable[Run]) -> None:
    """Refuses runs that are expected not to fit into the memory.

    Raises:
        MemoryError: the run is named.
    """
    for run in runs:
        try:
            check_memory(run.config, run.settings)
        except MemoryError as error:
            raise MemoryError(f"{run.name}: {error}") from error


def print_runs(
    runs: Sequence[Run], ledger: Ledger, console: Console, later: int | None = None, later_flops: float = 0.0
) -> None:
    """Prints those of the runs that the ledger does not have, and what all will take.

    Args:
        later: how many more will follow that are not known yet; None where all are.
        later_flops: training FLOPs of those.
    """
    pending = ledger.missing(runs)
    pace = Pace(ledger.rows(), describe(), runs[0].settings if runs else TrainSettings())
    table = Table(title=f"Runs known so far and not in {ledger.path}", title_justify="left")
    for column in ("run", "model", "steps", "FLOPs", "expected"):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for run in pending:
        table.add_row(
            run.name,
            count_parameters(run.config).label,
            f"{run.settings.steps:,}",
            f"{run.flops:.3g}",
            format_duration(pace.seconds(run)),
        )
    console.print(table)
    seconds = sum(map(pace.seconds, pending))
    if later_flops:  # or a plan of nothing would be measured for
        seconds += later_flops * pace.seconds_per_flop()
    flops = sum(run.flops for run in pending) + later_flops
    follow = f", and {later} later ones that depend on them" if later is not None else ""
    console.print(
        f"{len(pending)} runs{follow}; {flops:.3g} FLOPs, about {seconds / 3600:.2f} hours ({pace.source})",
        highlight=False,
        soft_wrap=True,
    )


def train_and_measure(
    run: Run,
    texts: Texts,
    measure: Measure | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Row:
    """Trains a run's model; returns what it came to. The model is gone afterwards."""
    settings, config = run.settings, run.config
    count = count_parameters(config)
    per_token = training_flops_per_token(config, settings.context)
    tokens = settings.steps * settings.tokens_per_step()
    row: Row = {
        "status": FINISHED,
        "labels": run.labels,
        "settings": stored_settings(settings),
        "seed": settings.seed,
        "flops": {"total": run.flops, "per_token": per_token.total, "parts": per_token.parts},
        "steps": settings.steps,
        "tokens": tokens,
        "epochs": tokens / len(texts.train),
        "parameters": dataclasses.asdict(count) | {"label": count.label},
        "precision": resolved_precision(settings),
        "texts": texts.describe(),
    }
    _free_memory()
    if can_measure():
        reset_peak()
    model = build_model(settings, texts.tokenizer, settings.vocab_size)
    logged = dataclasses.replace(settings, logging_steps=max(1, settings.steps // 40))
    try:
        history, seconds = fit(logged, model, texts.tokenizer, texts.streams, callbacks)
        row["seconds"] = round(seconds, 2)
        if paces := [entry["seconds_per_step"] for entry in history if "seconds_per_step" in entry]:
            row["seconds_per_step"] = statistics.median(paces)
        row["peak_bytes"] = _peak_bytes()
        # Without the routers' balancing loss, which is no part of the language model's.
        row["training_loss"] = [
            [entry["step"], entry["loss"] - entry.get("router_loss", 0.0)]
            for entry in history
            if "loss" in entry
        ]
        start = time.monotonic()
        row |= _measure(model, run, texts)
        if measure is not None:
            row["measured"] = dict(measure(run, model, texts))
        row["measuring_seconds"] = round(time.monotonic() - start, 2)
    except FloatingPointError as error:
        row |= {"status": DIVERGED, "reason": str(error)}
    del model
    _free_memory()
    return row


def _measure(model: PeerForCausalLM, run: Run, texts: Texts) -> Row:
    """Losses on whole documents, and how the experts were used on the validation text."""
    context = run.settings.context
    with ExitStack() as stack:
        usages = {
            name: stack.enter_context(ExpertUsage(layer)) for name, layer in retrieval_layers(model).items()
        }
        row: Row = {"validation": score_figures(score_documents(model, texts.validation, context=context))}
    row["expert_usage"] = usage_figures(usages)
    if run.tests:
        row["tests"] = {
            name: score_figures(score_documents(model, stream, context=context))
            for name, stream in texts.tests.items()
        }
    return row


def usage_figures(usages: Mapping[str, ExpertUsage]) -> dict[str, dict[str, Any]]:
    """How the experts of each layer were used, as rows hold it, and over how many tokens."""
    return {
        name: dataclasses.asdict(usage.figures()) | {"tokens": usage.tokens} for name, usage in usages.items()
    }


def score_figures(score: Score) -> dict[str, float]:
    """A score as rows hold it: nats per token, bits per byte, and over how much text."""
    return {
        "loss": score.loss,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }


def _recognise(run: Run, texts: Texts, ledger: Ledger) -> None:
    """Refuses text that is not what earlier rows were made with, though it is called the same."""
    now = texts.describe()
    for row in ledger.rows():
        if texts_key(TrainSettings.from_dict(row["settings"], row["name"])) != texts_key(run.settings):
            continue
        changed = [name for name, text in row.get("texts", {}).items() if text != now.get(name)]
        if changed:
            raise ValueError(
                f"data is not what {row['name']} in {ledger.path} was made with ({', '.join(changed)} "
                "differs), so their losses cannot be compared: bring the old text back, or give another "
                "--output"
            )


def _free_memory() -> None:
    """Gives back what a run has left: trainer and model refer to each other, kernels keep their buffers."""
    gc.collect()
    release_kept()


def _peak_bytes() -> int | None:
    """The process's most since `reset_peak`, on a GPU its tensors'; None where no system says so."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM") if can_measure() else None
