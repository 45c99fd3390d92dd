"""Callbacks for transformers' Trainer: expert usage in any of them, and progress and interruption in ours."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from accelerate.utils import reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from million_experts.layers import ExpertUsage, ProductKeyRetrieval, Routing
from million_experts.lm.memory import resident_bytes


def retrieval_layers(model: nn.Module | None) -> dict[str, ProductKeyRetrieval]:
    """The layers of a model that retrieve experts, by their names in it."""
    modules = [] if model is None else model.named_modules()
    return {name: m for name, m in modules if isinstance(m, ProductKeyRetrieval)}


class EvaluationUsage(ExpertUsage):
    """Expert usage of a layer in evaluation mode alone; training passes do not count, nor does padding.

    Args:
        layer: the layer to listen to.
        mask: gives the attention mask [B, L] of the pass that is under way, or None: the layer may sit in a
            model that does not hand it down.
    """

    def __init__(self, layer: ProductKeyRetrieval, mask: Callable[[], Tensor | None]):
        super().__init__(layer)
        self._mask = mask

    def _add(self, layer: ProductKeyRetrieval, routing: Routing) -> None:
        if layer.training:
            return
        mask = self._mask()
        if mask is not None and mask.numel() == len(routing.gates):
            real = mask.flatten().bool()
            routing = Routing(*(tensor[real] for tensor in routing))
        super()._add(layer, routing)

    def reset(self) -> None:
        """Forgets what was heard so far."""
        if self.tokens:  # to clear a million numbers in every step would take its time
            self.mass.zero_()
            self.tokens = 0


class ExpertUsageCallback(TrainerCallback):
    """Logs each PEER layer's expert usage, unevenness and top share after every evaluation.

    Works in any `Trainer` whose model holds PEER layers, wherever they are:

        trainer.add_callback(ExpertUsageCallback(trainer))

    The figures, as the paper defines them (see `ExpertUsage`), are those of the evaluation's own tokens,
    padding left out by the `attention_mask` that the model is called with, and go where the trainer's metrics
    go as `expert_usage/LAYER`, `expert_unevenness/LAYER` and `expert_top_share/LAYER`. Processes that train
    together put their tokens together.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._usage: dict[str, EvaluationUsage] = {}
        self._mask: Tensor | None = None
        self._mask_hook: RemovableHandle | None = None
        self._listen()

    def _listen(self) -> None:
        for usage in self._usage.values():
            usage.close()
        if self._mask_hook is not None:
            self._mask_hook.remove()
        model = self.trainer.model
        self._usage = {
            name: EvaluationUsage(layer, lambda: self._mask)
            for name, layer in retrieval_layers(model).items()
        }
        if model is not None:
            self._mask_hook = model.register_forward_pre_hook(self._keep_mask, with_kwargs=True)

    def _keep_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _reset(self) -> None:
        for usage in self._usage.values():
            usage.reset()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._listen()  # `model_init` may have made another model

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reset()  # what a callback had the model generate, say

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        self._reset()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        figures: dict[str, float] = {}
        for name, usage in self._usage.items():
            if args.world_size > 1:
                usage.mass = reduce(usage.mass.to(args.device), "sum").cpu()
                usage.tokens = int(reduce(torch.tensor(usage.tokens, device=args.device), "sum"))
            if usage.mass.sum() > 0:  # not where NaN came through either: the evaluation itself shows that
                of_layer = usage.figures()
                figures[f"expert_usage/{name}"] = of_layer.usage
                figures[f"expert_unevenness/{name}"] = of_layer.unevenness
                figures[f"expert_top_share/{name}"] = of_layer.top_share
        if figures:
            self.trainer.log(figures)
        self._reset()


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
        self._bar: Progress | None = None

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

    def stop(self) -> None:
        """Gives the terminal back; for when training ends without saying so."""
        if self._bar is not None:
            self._bar.stop()

    def _status(self, step: int) -> str:
        seconds = max(1e-9, time.monotonic() - self._start - self._evaluating)
        rate = (step - self._first_step) * self.tokens_per_step / seconds
        return f"loss {self._loss}{self._validation}  {rate:,.0f} tokens/s"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        if self._bar is not None:
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
            self._end_evaluation()  # `on_evaluate` comes after this
            self._validation = f"  validation {logs['eval_loss']:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, status=self._status(state.global_step))
        if not self.console.is_terminal and ("loss" in logs or "eval_loss" in logs):
            step = state.global_step
            done = max(1, step - self._first_step)
            left = (time.monotonic() - self._start) / done * (state.max_steps - step)
            line = f"step {step}/{state.max_steps}  {self._status(step)}  {left:.0f} s left"
            self.console.print(line, soft_wrap=True)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._evaluation_start is None:
            self._evaluation_start = time.monotonic()

    def _end_evaluation(self) -> None:
        if self._evaluation_start is not None:
            self._evaluating += time.monotonic() - self._evaluation_start
            self._evaluation_start = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()


class ResourceCallback(TrainerCallback):
    """Speed of the steps and memory of the process, for the trainer's log."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._seconds, self._steps = 0.0, 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._begun is not None:
            self._seconds += time.monotonic() - self._begun
            self._steps += 1
            self._begun = None

    def figures(self) -> dict[str, float]:
        """Seconds of a step since the last call, without evaluations and checkpoints, and memory now, in GB.

        On a CPU the memory is what is resident, on a GPU what its tensors have taken at most.
        """
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes()
        figures = {"memory_gb": round(memory / 1e9, 3)}
        if self._steps:
            figures["seconds_per_step"] = round(self._seconds / self._steps, 4)
        self._seconds, self._steps = 0.0, 0
        return figures


class RunFolderCallback(TrainerCallback):
    """Calls `check` before a checkpoint is written: it raises where the run's folder is no longer its own."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self.check()


class InterruptCallback(TrainerCallback):
    """Ctrl-C, SIGTERM and SIGHUP, the end of the terminal, save a checkpoint at the step's end and stop.

    A second Ctrl-C stops at once. Of processes that train together all stop at the same step. A SIGHUP that
    is ignored, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
        # Not the console: its lock may be held by what the signal interrupted.
        with suppress(OSError, ValueError):  # its reader may be gone
            sys.stderr.write(
                "\nStopping at the end of this step, with a checkpoint; Ctrl-C again stops at once.\n"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            anyone = torch.tensor(float(self.interrupted), device=args.device)
            self.interrupted = bool(reduce(anyone, "sum"))
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
