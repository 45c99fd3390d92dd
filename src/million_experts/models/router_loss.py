"""The routers' own losses as part of a model's loss, whoever computes the rest of it."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor

__all__ = ["keep_router_loss_when_smoothing", "share_of_items"]


def share_of_items(labels: Tensor, num_items_in_batch: Tensor | int | None, ignore_index: int = -100) -> Any:
    """The part of a batch's items that a micro-batch's shifted labels are; 1 without a larger batch."""
    return 1.0 if num_items_in_batch is None else (labels != ignore_index).sum() / num_items_in_batch


def keep_router_loss_when_smoothing() -> None:
    """Let transformers' label smoothing add the `router_loss` of an output that has one.

    `Trainer(label_smoothing_factor=...)` takes the labels from the model and computes a loss from its logits
    alone; there is no other place to put the rest. Outputs without a router's loss are treated as before.
    """
    from transformers.trainer_pt_utils import LabelSmoother

    smooth: Any = LabelSmoother.__call__
    if hasattr(smooth, "__wrapped__"):
        return

    @wraps(smooth)
    def smooth_and_add(
        self: Any, model_output: Any, labels: Tensor, shift_labels: bool = False, **kwargs: Any
    ) -> Tensor:
        loss = smooth(self, model_output, labels, shift_labels=shift_labels, **kwargs)
        router_loss = getattr(model_output, "router_loss", None)
        if router_loss is None:
            return loss
        targets = labels[..., 1:] if shift_labels else labels
        return loss + router_loss * share_of_items(
            targets, kwargs.get("num_items_in_batch"), self.ignore_index
        )

    setattr(LabelSmoother, "__call__", smooth_and_add)  # noqa: B010 (its signature depends on the version)
