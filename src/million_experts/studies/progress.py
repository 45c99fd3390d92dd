"""How long runs will take, and how far they are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from million_experts.benchmarks.steps import LanguageModel
from million_experts.lm.memory import takes_bfloat16
from million_experts.lm.settings import TrainSettings
from million_experts.lm.training import model_config
from million_experts.models import PeerForCausalLM
from million_experts.models.attention import with_fast_attention
from million_experts.studies.flops import training_flops_per_token

if TYPE_CHECKING:
    from million_experts.studies.runs import Run

PROBE_TOKENS = 1024


class Pace:
    """Seconds that a run will take, by the runs that this machine has finished, or else by a quick measure.

    Args:
        rows: of a ledger; those of other machines or numbers of threads do not count.
        machine: what `benchmarks.machine.describe` says of this one.
        settings: of one of the runs, of which the measure is taken.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], machine: Mapping[str, Any], settings: TrainSettings
    ):
        self._machine, self._settings = machine, settings
        self._finished: list[tuple[Any, float, float]] = []
        self._measured: float | None = None
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes a finished run into account."""
        if _speed_of(row) == _speed_of(self._machine) and "measuring_seconds" in row:
            seconds = row["seconds"] + row["measuring_seconds"]
            self._finished.append((row["labels"].get("method"), row["flops"]["total"], seconds))

    def seconds(self, run: Run) -> float:
        """Of a run: as long per FLOP as the finished ones of its method, or as all."""
        return run.flops * self.seconds_per_flop(run.labels.get("method"))

    @property
    def source(self) -> str:
        """What the expectation rests on."""
        if self._finished:
            return f"by {len(self._finished)} finished runs"
        return (
            "a guess by a step of a dense model, without what testing takes, until a run has been finished "
            "on this machine with as many threads"
        )

    def seconds_per_flop(self, method: Any = None) -> float:
        """Of finished runs of a method, if there are any, or of all, or by the measure."""
        alike = [entry for entry in self._finished if entry[0] == method] or self._finished
        if alike:
            return sum(seconds for _, _, seconds in alike) / sum(flops for _, flops, _ in alike)
        if self._measured is None:
            self._measured = 1 / training_flops_per_second(self._settings)
        return self._measured


def training_flops_per_second(settings: TrainSettings) -> float:
    """What training of the settings' model reaches with dense feed-forwards: the best of three steps."""
    dense = settings.with_overrides({"mlp_layer_types": "dense"})
    config = model_config(dense, dense.vocab_size)
    bfloat16 = takes_bfloat16(dense.precision)
    # A build for GPUs names its accelerator without a driver, too.
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    with torch.device(device or "cpu"):
        model = LanguageModel(with_fast_attention(PeerForCausalLM(config), bfloat16), bfloat16)
        tokens = torch.randint(dense.vocab_size, (max(1, PROBE_TOKENS // dense.context), dense.context))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        loss = model(tokens)
        loss.backward()
        model.zero_grad()
        loss.item()  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return training_flops_per_token(config, dense.context).total * tokens.numel() / best


def _speed_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the speed of a run depends on; system and exact memory change from one start to the next."""
    machine = row.get("machine", {})
    return *(machine.get(key) for key in ("cpu", "cores", "instruction_set")), row.get("threads")


class StudyProgress:
    """A bar over the runs with the time left, and one over the steps of the run under way.

    Where the output is no terminal, a line at the beginning and at the end of each run.
    """

    def __init__(self, console: Console, runs: Sequence[Run], pace: Pace, later_flops: float = 0.0):
        self.console, self.pace, self._later = console, pace, later_flops
        self._left = list(runs)
        self._total = len(runs)
        self.callback = _Steps(self)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._runs = self._bar.add_task("runs", total=sum(run.flops for run in runs), status="")
        self._steps = self._bar.add_task("", total=None, status="")

    def __enter__(self) -> StudyProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Shows what is being done between runs."""
        self._bar.update(self._steps, description=text, total=None, status="")

    def begin(self, run: Run) -> None:
        """A run begins."""
        self._bar.reset(self._steps, total=run.settings.steps, description=escape(run.name))
        self._show(0.0)
        if not self.console.is_terminal:
            self._print(f"{self._place()} {run.name}: {run.settings.steps:,} steps, {run.flops:.3g} FLOPs")

    def end(self, run: Run, row: Mapping[str, Any]) -> None:
        """A run has ended with a row."""
        place = self._place()
        self._left.remove(run)
        self.pace.add(row)
        self._bar.advance(self._runs, run.flops)
        self._show(0.0)
        if row["status"] == "finished":
            text = f"validation {row['validation']['loss']:.4f} nats, {row['seconds']:.0f} s"
        else:
            text = row["status"]
        self._print(f"{place} {run.name}: {text}; {self._time_left(0.0)}")

    def step(self, step: int, steps: int) -> None:
        """The run under way has taken a step."""
        self._bar.update(self._steps, completed=step, status=f"step {step}/{steps}")
        self._show(step / steps)

    def _show(self, share: float) -> None:
        self._bar.update(
            self._runs, description=f"runs {self._place()}", status=self._time_left(share), refresh=False
        )

    def _place(self) -> str:
        return f"{min(self._total, self._total - len(self._left) + 1)}/{self._total}"

    def _time_left(self, share: float) -> str:
        seconds = self._later * self.pace.seconds_per_flop()
        for i, run in enumerate(self._left):
            seconds += self.pace.seconds(run) * (1 - share if i == 0 else 1)
        return f"{format_duration(seconds)} left"

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Steps(TrainerCallback):
    def __init__(self, progress: StudyProgress):
        self._progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.step(state.global_step, state.max_steps)


def format_duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a reader wants them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
