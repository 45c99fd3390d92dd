"""transformers' Trainer with checkpoints that are whole or not there, and no training on after NaN."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_PARTIAL = ".partial-checkpoint"


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the message says why and what to do."""


class LanguageModelTrainer(Trainer):
    """`Trainer` for our runs.

    A checkpoint is written to a temporary folder, synced and renamed, so that a folder `checkpoint-N` is
    whole whenever the process dies; the one before it stays until then. A loss that is not finite ends the
    training before it reaches the weights.
    """

    _writing_to: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        partial = run / _PARTIAL
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._writing_to = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_to = None
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            _sync_tree(partial / name)
            shutil.rmtree(run / name, ignore_errors=True)  # left by a run that went another way
            os.rename(partial / name, run / name)
            _sync(run)
            partial.rmdir()
            for _, old in list_checkpoints(run)[: -(self.args.save_total_limit or 10**9)]:
                shutil.rmtree(old)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} in step {self.state.global_step + 1}; training stopped "
                "before the step changed the weights. Try a lower learning_rate or table_learning_rate, more "
                "warmup_steps, or precision float32"
            )
        return loss


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first."""
    found = []
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and step.isdigit():
            found.append((int(step), folder))
    return sorted(found)


def check_checkpoint(folder: Path, model: nn.Module) -> None:
    """Makes sure that a checkpoint can be read and fits the model, before anything is loaded from it.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are those of another configuration.
    """
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} is not whole: it has no {name}{_way_out(folder)}")
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: model.safetensors cannot be read ({error}){_way_out(folder)}"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in stored.items():
        if wanted.get(name) != shape:
            raise CheckpointError(
                f"checkpoint {folder} belongs to another configuration: it holds {name} of shape "
                f"{list(shape)}, the model {f'needs {list(wanted[name])}' if name in wanted else 'has none'}"
            )
    try:
        torch.load(folder / "optimizer.pt", map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: optimizer.pt cannot be read ({error}){_way_out(folder)}"
        ) from error


def _way_out(folder: Path) -> str:
    others = [str(other) for _, other in list_checkpoints(folder.parent) if other != folder]
    if not others:
        return "; there is no other checkpoint in the run: start again with another --output-dir"
    return f"; remove it to go on from {others[-1]}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))
