"""Gradient norms where some gradients are sparse."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from million_experts.ops.library import STEPS_IN_BACKWARD
from million_experts.optim.row_state import merge_rows


def merge_repeated_rows(grad: Tensor) -> Tensor:
    """A sparse gradient whose rows ascend, each once: what micro-batches left, summed in their order.

    Args:
        grad: sparse COO with one sparse dimension.

    Returns:
        The same gradient, coalesced. Unlike `Tensor.coalesce` the sum of a row has one order, whatever the
        number of threads, and rows that ascend already are not copied.
    """
    rows, places, starts = merge_rows(grad._indices()[0], grad.shape[0])
    values = grad._values()
    if places is not None and starts is not None:
        flat = values.reshape(len(values), -1)
        sums = F.embedding_bag(places, flat, starts, mode="sum", include_last_offset=True)
        values = sums.view(len(rows), *values.shape[1:])
    return torch.sparse_coo_tensor(rows[None], values, grad.shape, check_invariants=False, is_coalesced=True)


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` that takes sparse gradients too, without making them dense.

    Args:
        parameters: those whose gradients count as one vector. Rows that came several times, from
            micro-batches, are merged first: the norm is that of their sum.
        max_norm: gradients are scaled down to this 2-norm if theirs is larger; infinite for the norm alone.

    Returns:
        The norm before clipping.

    Raises:
        ValueError: max_norm is not a positive number, or a parameter steps in backward, where its gradient
            is gone when the norm is known.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be a positive number, got {max_norm}")
    gradients = []
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        if max_norm < math.inf and p in STEPS_IN_BACKWARD:
            raise ValueError("clipping needs the gradient of a table that steps in backward: none is kept")
        if p.grad is None:
            continue
        if p.grad.is_sparse and not p.grad.is_coalesced():
            p.grad = merge_repeated_rows(p.grad)
        gradients.append(p.grad._values() if p.grad.is_sparse else p.grad)
    norm = get_total_norm(gradients)
    if max_norm < math.inf and gradients:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        # As in torch a product with 1 rather than a branch on data; except on a CPU, where to look costs
        # nothing, and the rows of a large table would be read and written.
        if factor.device.type != "cpu" or factor != 1:
            torch._foreach_mul_(gradients, factor)
    return norm
