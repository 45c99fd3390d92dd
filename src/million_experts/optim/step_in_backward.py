"""A step of RowwiseAdamW that is taken while the gradient comes, so that no gradient is ever kept."""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from million_experts.layers import PEER
from million_experts.ops.library import STEPS_IN_BACKWARD
from million_experts.ops.reference import Visit

if TYPE_CHECKING:
    from million_experts.optim.rowwise import RowwiseAdamW


class StepInBackward:
    """Called when a table's gradient begins to come; hands out what updates the rows that it is for."""

    def __init__(self, optimizer: "RowwiseAdamW", table: Tensor):
        self._optimizer, self._table = weakref.ref(optimizer), weakref.ref(table)
        self.taken = False  # since the optimiser's last step

    def __call__(self, *factors: Tensor) -> Visit | None:
        """Begins the step; None where the backward pass adds nothing to the table's gradient.

        Args:
            factors: that the gradient is made of; where one is not finite, the table does not move.
        """
        optimizer, table = self._optimizer(), self._table()
        if optimizer is None or table is None:
            raise RuntimeError(
                "the optimiser that steps in backward for this table is gone: keep it, or make the layer anew"
            )
        if not _is_accumulated(table):
            return None
        if self.taken:
            raise RuntimeError(
                "a second gradient came for a table that steps in backward: call the optimiser's step() "
                "after every backward(). Micro-batches that add up, and layers that are used twice in one "
                "forward pass, need their gradients kept: leave fuse_into_backward out"
            )
        _check_finite(*factors)
        self.taken = True
        visit = optimizer.begin_step(table)
        if table.dtype != torch.float16:
            return visit

        def visit_finite(rows: Tensor, values: Tensor) -> None:  # float16 overflows where its factors do not
            _check_finite(values)
            visit(rows, values)

        return visit_finite


def _is_accumulated(table: Tensor) -> bool:
    """Whether the backward pass that is running adds to the table's `grad`.

    One that asks for other gradients does not, and `torch.autograd.grad` hands out the table's own instead.
    """
    if not table.requires_grad:  # frozen since the forward pass
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(table).node)
    except RuntimeError:  # torch has no answer where the gradient is handed out
        return False


def _check_finite(*tensors: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise FloatingPointError(
            "the gradient of a table that steps in backward is not finite: these rows have not moved. A "
            "GradScaler, which lets gradients overflow, needs them kept: leave fuse_into_backward out"
        )


def register(optimizer: "RowwiseAdamW", layer: PEER) -> StepInBackward:
    """Makes the layer's backward pass update its table; see `RowwiseAdamW.fuse_into_backward`."""
    if not isinstance(layer, PEER):
        raise ValueError(f"fuse_into_backward takes PEER layers, got {type(layer).__name__}")
    if not layer.sparse_grad:
        raise ValueError("fuse_into_backward needs layers with sparse_grad=True, got False")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError("fuse_into_backward works in one process: ranks have to exchange gradients first")
    if layer.experts in STEPS_IN_BACKWARD:
        raise ValueError("the layer steps in backward already")
    step = StepInBackward(optimizer, layer.experts)
    STEPS_IN_BACKWARD[layer.experts] = step
    return step
