"""transformers' Trainer with checkpoints that are whole or not there, and no training on after NaN."""

import logging
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from million_experts.distributed import (
    exchange_row_gradients,
    synchronise_query_norm,
    take_tables_from_ddp,
)
from million_experts.layers import ProductKeyRetrieval
from million_experts.lm.callbacks import ResourceCallback
from million_experts.lm.checkpoints import CheckpointError, list_checkpoints
from million_experts.lm.files import explained, scratch_folder, settle, sync
from million_experts.optim import RowwiseAdamW, clip_grad_norm_

# One process, or one a device under DistributedDataParallel.
_DATA_PARALLEL = {kind for kind in DistributedType if kind == DistributedType.NO or "MULTI_" in kind.value}


class LanguageModelTrainer(Trainer):
    """`Trainer` for our runs.

    A checkpoint is written to a temporary folder, synced and renamed, so that a folder `checkpoint-N` is
    whole whenever the process dies; the one before it stays until then. One that cannot be written ends the
    training with what to do about it. A loss or a gradient that is not finite ends the training before it
    reaches the weights. The routers' balancing losses, which are part of the training loss, are logged beside
    it. Sparse gradients are clipped with the others, and the rows that they left behind are
    brought up to date before weights are evaluated or saved. Ranks under `torchrun` exchange sparse
    gradients as rows.

    Args:
        sync_query_norm: under `torchrun`, let query BatchNorm take the statistics of all ranks' tokens.

    Raises:
        ValueError: tables with sparse gradients under a kind of parallelism that cannot exchange them, or
            load_best_model_at_end, which looks for checkpoints where they are only written.
    """

    _writing_to: str | None = None

    def __init__(self, *args: Any, sync_query_norm: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end must be False: keep the checkpoints and load the best")
        self.resources = ResourceCallback()
        self._router_losses: list[Tensor] = []
        self.add_callback(self.resources)
        kind, model = self.accelerator.distributed_type, self.model
        assert model is not None
        if any(isinstance(m, ProductKeyRetrieval) and m.sparse_grad for m in model.modules()) and (
            kind not in _DATA_PARALLEL or self.args.n_gpu > 1
        ):
            name = "DataParallel" if kind in _DATA_PARALLEL else kind.value
            raise ValueError(
                f"sparse_grad=True trains in one process or data parallel, one process a device (torchrun "
                f"--nproc-per-node N), not under {name}: use that, or sparse_grad=False"
            )
        self._among_ranks = kind in _DATA_PARALLEL and self.args.world_size > 1
        if self._among_ranks:
            take_tables_from_ddp(model)
            if sync_query_norm:
                synchronise_query_norm(model)

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing_to or super()._get_output_dir(trial)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs beside a training loss what part of it is the routers', the time of a step, and memory.

        `router_loss` is there where a layer has one: the mean over the batches since the last log.
        """
        if "loss" in logs:
            logs = logs | self.resources.figures()
            if self._router_losses:
                logs["router_loss"] = torch.stack(self._router_losses).mean().item()
                self._router_losses = []
        super().log(logs, *args, **kwargs)

    def flush(self) -> None:
        """Brings every row of every table up to date, where the optimiser is one that lets rows wait."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if isinstance(optimizer, RowwiseAdamW):
            optimizer.flush()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.flush()
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        kept = list_checkpoints(run)
        way = f"go on from {kept[-1][1]} by --resume" if kept else "start again by --resume"
        advice = f"Make room there, or let it be written to, then {way}"
        with explained(f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", run, advice):
            self.flush()
            with scratch_folder(run, "checkpoint-") if self.args.should_save else nullcontext() as scratch:
                self._write_checkpoint(model, trial, run, scratch)

    def _write_checkpoint(self, model: nn.Module, trial: Any, run: Path, scratch: Path | None) -> None:
        # Each rank writes its random state into the folder that the first one made.
        self._writing_to = broadcast_object_list([scratch and str(scratch)])[0]
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_to = None
        self.accelerator.wait_for_everyone()
        if scratch is not None:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            settle(scratch / name)
            # What goes is moved out of sight first: half deleted, it would look like a damaged checkpoint.
            if (run / name).exists():  # left by a run that went another way
                os.rename(run / name, scratch / "replaced")
            os.rename(scratch / name, run / name)
            sync(run)
            for _, old in list_checkpoints(run)[: -(self.args.save_total_limit or 10**9)]:
                os.rename(old, scratch / old.name)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        router_loss = getattr(outputs, "router_loss", None)
        if router_loss is not None:
            self._router_losses.append(router_loss.detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._diverged("loss", loss)
        if self._among_ranks and self.accelerator.sync_gradients:
            exchange_row_gradients(model)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if _has_sparse_gradients(model):  # transformers and torch refuse them
            return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and _has_sparse_gradients(model):
            grad_norm = clip_grad_norm_(model.parameters(), math.inf)
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(norm):
            raise self._diverged("gradient's norm", norm)
        return norm

    def _diverged(self, what: str, value: Any) -> FloatingPointError:
        return FloatingPointError(
            f"the {what} became {float(value)} in step {self.state.global_step + 1}; training stopped before "
            "the step changed the weights. Try a lower learning_rate or table_learning_rate, more "
            "warmup_steps, or precision float32, in a run with another --output-dir"
        )

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # A checkpoint brings along how often to log, evaluate and save; what is asked for now holds instead.
        # transformers would warn that it does not.
        logger = logging.getLogger("transformers.trainer_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            done = super()._init_training_state(max_steps, *args, **kwargs)
        finally:
            logger.setLevel(level)
        self.state.compute_steps(self.args, max_steps)
        return done

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {checkpoint} cannot be resumed: {error}") from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied tensor is stored under one of its names: the other is not missing.
        tied = getattr(self.model, "all_tied_weights_keys", {})
        absent = load_result.missing_keys
        missing = [name for name in absent if tied.get(name, name) in absent]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers' own takes one step too many when it resumes from the last step's checkpoint.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def _has_sparse_gradients(model: nn.Module) -> bool:
    return any(p.grad is not None and p.grad.is_sparse for p in model.parameters())
