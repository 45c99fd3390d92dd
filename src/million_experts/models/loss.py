"""The loss of a language model, a few rows of logits at a time.

PyTorch's cross entropy of bfloat16 logits makes four float32 tensors of their size (a copy, logarithms of
probabilities, two gradients), each of which goes to memory and back: a third of a small model's step. Here
float32 numbers live in the cache alone.

Legend: B sequences, L positions, T = B * L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

from million_experts.layers.tokens import has_readable_values

# Of the float32 numbers at work at a time: a thread's shall stay in its core's cache, a GPU's keep it busy.
_CHUNK_BYTES, _CHUNK_BYTES_GPU = 2**18, 2**28


def causal_language_model_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mean cross entropy of the next tokens in nats, as transformers' `ForCausalLMLoss`.

    Args:
        logits: [B, L, V].
        labels: [B, L] token ids, not shifted; `ignore_index` where no loss is wanted.
        vocab_size: V.
        num_items_in_batch: the loss is the sum over the labels by this number in place of their own.
        ignore_index: see `labels`.
        shift_labels: [B, L] labels that are shifted already, in place of `labels`.
        kwargs: for transformers.

    Raises:
        ValueError: as many labels as tokens are wanted, and, on a CPU, each of them in 0 ... V - 1.
        RuntimeError: double backward.
    """
    # A compiler fuses what a loop would hide from it; transforms of torch.func need operations they know.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return ForCausalLMLoss(
            logits,
            labels,
            vocab_size,
            num_items_in_batch,  # type: ignore[arg-type]  # a number will do
            ignore_index,
            shift_labels,
            **kwargs,
        )
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    _check_labels(logits, targets, vocab_size, ignore_index)
    losses = _CrossEntropy.apply(logits.reshape(-1, vocab_size), targets, ignore_index)
    items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / (items.to(logits.device) if isinstance(items, Tensor) else items)


def _check_labels(logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    if targets.numel() * vocab_size != logits.numel():
        raise ValueError(
            f"labels must have one for each token of logits {list(logits.shape)}, got {targets.numel()}"
        )
    if targets.device.type != "cpu" or not has_readable_values(
        targets
    ):  # to look at them would wait for the device
        return
    allowed = (targets == ignore_index) | (targets >= 0) & (targets < vocab_size)
    if not allowed.all():
        wrong = targets[~allowed][0]
        raise ValueError(f"labels must be {ignore_index} or in 0 ... {vocab_size - 1}, got {wrong}")


class _CrossEntropy(torch.autograd.Function):
    """Losses [T] of logits [T, V] and targets [T], 0 where a target is `ignore_index`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        ignored = targets == ignore_index
        targets = targets.masked_fill(ignored, 0)[:, None]
        normaliser = torch.empty(len(logits), 1, dtype=wide, device=logits.device)
        losses = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in _chunks(logits):
            x = logits[rows].to(wide)
            torch.logsumexp(x, -1, keepdim=True, out=normaliser[rows])
            losses[rows] = (normaliser[rows] - x.gather(1, targets[rows]))[:, 0]
        ctx.save_for_backward(logits, targets, ignored, normaliser)
        return losses.masked_fill_(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, ignored, normaliser = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_losses = grad_losses.masked_fill(ignored, 0)[:, None]
        grad_logits = torch.empty_like(logits)
        for rows in _chunks(logits):
            probabilities = (logits[rows] - normaliser[rows]).exp_()
            one = probabilities.new_full((), -1.0).expand(len(probabilities), 1)
            grad_logits[rows] = probabilities.scatter_add_(1, targets[rows], one).mul_(grad_losses[rows])
        return grad_logits, None, None


def _chunks(logits: Tensor) -> list[slice]:
    on_cpu = logits.device.type == "cpu"
    chunk_bytes = _CHUNK_BYTES * torch.get_num_threads() if on_cpu else _CHUNK_BYTES_GPU
    step = max(1, chunk_bytes // (4 * max(1, logits.shape[1])))
    return [slice(start, start + step) for start in range(0, len(logits), step)]
