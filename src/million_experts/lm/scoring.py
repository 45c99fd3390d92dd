"""The loss of a language model on whole documents, comparable across contexts, batch sizes and tokenizers.

Legend: B rows of a batch, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from million_experts.lm.loading import check_tokens
from million_experts.lm.packing import TokenStream

IGNORE = -100  # cross_entropy's own mark for positions without a target


class Score(NamedTuple):
    """Total negative log-likelihood in nats, the number of predicted tokens, and the text's UTF-8 bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text: the one figure that different tokenizers share."""
        return self.nats / math.log(2) / self.bytes


def score_documents(
    model: torch.nn.Module,
    stream: TokenStream,
    *,
    context: int,
    batch_tokens: int = 8192,
    stride: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score each document by itself: every token after its leading end token, and its closing one, once.

    A document longer than `context` is read through windows that advance by `stride`; only what no earlier
    window predicted counts, so a later window predicts from more than `context - stride` tokens.

    Args:
        model: a causal language model of transformers, called with `input_ids`, `attention_mask` and
            `use_cache=False`. It runs in eval mode and comes back in the mode it had.
        stream: T tokens, which are T predictions.
        context: most tokens the model sees at once.
        batch_tokens: most tokens of a padded batch, unless one row has more; bounds the logits in memory.
        stride: 1..context, by default half of `context`.
        device: where the model is, by default that of its first parameter.
        progress: called after each batch with the predictions made and their total.

    Raises:
        ValueError: an argument is out of its range, or the stream holds a token that the model does not know.
        FloatingPointError: the model gave a loss that is not finite.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be in 1..context={context}, got {stride}")
    check_tokens(model, max(stream.end_id, int(stream.tokens.max(initial=0))))
    device = next(model.parameters()).device if device is None else device

    windows = _windows(stream, context, stride)
    nats, done = 0.0, 0
    with evaluation_mode(model), torch.inference_mode():
        for batch in _batches(windows, batch_tokens):
            input_ids, attention_mask, targets = (x_BL.to(device) for x_BL in _collate(stream, batch))
            logits_BLV = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            losses = F.cross_entropy(
                logits_BLV.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
            )
            batch_nats = losses.double().sum().item()
            if not math.isfinite(batch_nats):
                row = int((~losses.view(targets.shape).isfinite()).any(1).nonzero()[0, 0])
                document = int(np.searchsorted(stream.starts, batch[row, 0], side="right")) - 1
                raise FloatingPointError(
                    f"the model's loss on document {document} is not finite: {batch_nats}"
                )
            nats += batch_nats
            done += int((batch[:, 1] - batch[:, 2]).sum())
            if progress is not None:
                progress(done, len(stream))
    return Score(nats=nats, tokens=done, bytes=stream.text_bytes)


def _windows(stream: TokenStream, context: int, stride: int) -> np.ndarray:
    """Rows (begin, end, first) of places in the stream: begin..end-1 are read, first..end-1 predict."""
    rows = []
    for begin, document_end in zip(stream.starts, np.append(stream.starts[1:], len(stream)), strict=True):
        first = begin
        while first < document_end:
            end = min(begin + context, document_end)
            rows.append((begin, end, first))
            begin, first = begin + stride, end
    return np.array(rows, dtype=np.int64)


def _batches(windows: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    # Longest first: rows of like length share a batch, and a batch too large for memory fails at once.
    lengths = windows[:, 1] - windows[:, 0]
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        rows = max(1, batch_tokens // int(lengths[order[at]]))
        yield windows[order[at : at + rows]]
        at += rows


def _collate(stream: TokenStream, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded input_ids, attention_mask and targets, int64 [B, L]; IGNORE where no target counts."""
    shape = len(batch), int((batch[:, 1] - batch[:, 0]).max())
    input_ids = np.full(shape, stream.end_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    for row, (begin, end, first) in enumerate(batch):
        length, skipped = end - begin, first - begin
        input_ids[row, :length] = stream.tokens[begin:end]
        attention_mask[row, :length] = 1
        # After a document's last token comes the next document's end token; after the last document, end_id.
        targets[row, skipped:length] = stream.end_id
        following = stream.tokens[first + 1 : end + 1]
        targets[row, skipped : skipped + len(following)] = following
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask), torch.from_numpy(targets)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    # Module by module: part of a model in training may be in eval mode on purpose.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
