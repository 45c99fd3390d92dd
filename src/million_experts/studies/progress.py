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

from million_experts.lm.memory import takes_bfloat16

if TYPE_CHECKING:
    from million_experts.studies.runs import Run

# Of the speed of one large matrix product, what training a small model reaches.
UTILISATION = 0.3


class Pace:
    """Seconds that a run will take, by the runs that this machine has finished, or else by a quick measure.

    Args:
        rows: of a ledger; those of other machines or numbers of threads do not count.
        machine: what `benchmarks.machine.describe` says of this one.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], machine: Mapping[str, Any]):
        self._machine = machine
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
        return "by a matrix product: a guess until a run is finished"

    def seconds_per_flop(self, method: Any = None) -> float:
        """Of finished runs of a method, if there are any, or of all, or by the measure."""
        alike = [entry for entry in self._finished if entry[0] == method] or self._finished
        if alike:
            return sum(seconds for _, _, seconds in alike) / sum(flops for _, flops, _ in alike)
        if self._measured is None:
            self._measured = 1 / (UTILISATION * matrix_flops_per_second())
        return self._measured


def matrix_flops_per_second() -> float:
    """What this machine's matrix product of a small model's shape reaches, measured for a moment."""
    dtype = torch.bfloat16 if takes_bfloat16("auto") else torch.float32
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    a = torch.randn(4096, 256, device=device).to(dtype)
    b = torch.randn(256, 1024, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 4096 * 256 * 1024 / best


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
