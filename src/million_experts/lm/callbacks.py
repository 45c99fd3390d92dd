"""Callbacks for transformers' Trainer: expert usage in any of them, and progress and interruption in ours."""

import signal
import sys
import time
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from million_experts.layers import ExpertUsage, ProductKeyRetrieval, Routing


def retrieval_layers(model: nn.Module | None) -> dict[str, ProductKeyRetrieval]:
    """The layers of a model that retrieve experts, by their names in it."""
    modules = [] if model is None else model.named_modules()
    return {name: m for name, m in modules if isinstance(m, ProductKeyRetrieval)}


class EvaluationUsage(ExpertUsage):
    """Expert usage of a layer in evaluation mode alone; training passes do not count."""

    def _add(self, layer: ProductKeyRetrieval, routing: Routing) -> None:
        if not layer.training:
            super()._add(layer, routing)


class ExpertUsageCallback(TrainerCallback):
    """Logs each PEER layer's expert usage, unevenness and top share after every evaluation.

    Works in any `Trainer` whose model holds PEER layers, wherever they are:

        trainer.add_callback(ExpertUsageCallback(trainer))

    The figures, as the paper defines them (see `ExpertUsage`), are those of the evaluation's own tokens, and
    go where the trainer's metrics go as `expert_usage/LAYER`, `expert_unevenness/LAYER` and
    `expert_top_share/LAYER`.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._usage: dict[str, EvaluationUsage] = {}
        self._listen()

    def _listen(self) -> None:
        for usage in self._usage.values():
            usage.close()
        layers = retrieval_layers(self.trainer.model)
        self._usage = {name: EvaluationUsage(layer) for name, layer in layers.items()}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        figures: dict[str, float] = {}
        for name, usage in self._usage.items():
            if usage.tokens:
                of_layer = usage.figures()
                figures[f"expert_usage/{name}"] = of_layer.usage
                figures[f"expert_unevenness/{name}"] = of_layer.unevenness
                figures[f"expert_top_share/{name}"] = of_layer.top_share
        if figures:
            self.trainer.log(figures)
        self._listen()  # the next evaluation starts from nothing


class ProgressCallback(TrainerCallback):
    """A bar with loss, tokens/s and time left; a line at each log where the output is no terminal."""

    def __init__(self, tokens_per_step: int, console: Console):
        self.tokens_per_step = tokens_per_step
        self.console = console
        self._loss = "     -"
        self._validation = ""
        self._first_step, self._start = 0, time.monotonic()
        self._evaluating = 0.0  # seconds, which are not counted in tokens/s
        self._evaluation_start: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step, self._start = state.global_step, time.monotonic()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, status="")
        self._bar.start()

    def _status(self, step: int) -> str:
        seconds = max(1e-9, time.monotonic() - self._start - self._evaluating)
        rate = (step - self._first_step) * self.tokens_per_step / seconds
        return f"loss {self._loss}{self._validation}  {rate:,.0f} tokens/s"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        self._bar.update(self._task, completed=step, status=self._status(step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._loss = f"{logs['loss']:.3f}"
        if "eval_loss" in logs:
            self._validation = f"  validation {logs['eval_loss']:.3f}"
        if not self.console.is_terminal and ("loss" in logs or "eval_loss" in logs):
            step = state.global_step
            done = max(1, step - self._first_step)
            left = (time.monotonic() - self._start) / done * (state.max_steps - step)
            self.console.print(f"step {step}/{state.max_steps}  {self._status(step)}  {left:.0f} s left")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._evaluation_start is None:
            self._evaluation_start = time.monotonic()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._evaluation_start is not None:
            self._evaluating += time.monotonic() - self._evaluation_start
            self._evaluation_start = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.stop()


class InterruptCallback(TrainerCallback):
    """Ctrl-C and SIGTERM save a checkpoint at the step's end and stop; a second Ctrl-C stops at once."""

    def __init__(self, console: Console):
        self.console = console
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
        # Not the console: its lock may be held by what the signal interrupted.
        sys.stderr.write(
            "\nStopping at the end of this step, with a checkpoint; Ctrl-C again stops at once.\n"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
