"""Does training see the future? What a layer's choice of experts owes to later tokens, and its worth in loss.

Query BatchNorm normalises a token's query by the statistics of its batch, and under expert choice an expert
takes the tokens of the batch that suit it best: in training both let later tokens of a text decide a little
about what an earlier one gets. In evaluation neither does. Here both modes meet the same text.

Legend: B rows of a batch, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from million_experts.layers import ExpertChoiceMoE, MaskedBatchNorm, ProductKeyRetrieval
from million_experts.lm.packing import PackedBlocks
from million_experts.lm.scoring import evaluation_mode

if TYPE_CHECKING:
    from million_experts.studies.runs import Run
    from million_experts.studies.texts import Texts

MODES_TOKENS = 65_536
Batch = dict[str, Tensor]  # input_ids and position_ids, int64 [B, L]


@dataclass(frozen=True)
class ModeLosses:
    """Losses of one model on the same batches, nats per token.

    Attributes:
        loss_train_mode: with the batch's statistics, or the experts' choice.
        loss_eval_mode: with the running statistics, or the tokens' choice.
        tokens: that were predicted.
    """

    loss_train_mode: float
    loss_eval_mode: float
    tokens: int


@dataclass(frozen=True)
class FutureEffect:
    """How much the predictions of the first halves of rows change when other text takes the second halves.

    Attributes:
        logit_change: root mean square of the logits' change, nats.
        largest_logit_change: the largest of them.
        divergence: mean KL divergence of the changed prediction from the first one, nats.
        loss_own_future, loss_other_future: loss of the first halves before text of their own and before
            other text, nats per token. Where the future helps, the first is lower.
        tokens: that were predicted in the first halves.
    """

    logit_change: float
    largest_logit_change: float
    divergence: float
    loss_own_future: float
    loss_other_future: float
    tokens: int


def evaluate_modes(
    model: nn.Module, blocks: PackedBlocks, batch_size: int, most_tokens: int
) -> dict[str, dict[str, Any]]:
    """The figures of both modes for a row, under "batch_norm" or "expert_choice".

    The future's effect is left out where there is no other text to put there. For expert choice "loss_alone"
    is the loss of text that comes token by token, as it is generated, while experts go on choosing. Nothing
    for a model whose layers choose in training as in evaluation. Arguments as in `losses_by_mode`.
    """
    kinds = {"batch_norm": MaskedBatchNorm, "expert_choice": ExpertChoiceMoE}
    for name, kind in kinds.items():
        if any(isinstance(module, kind) for module in model.modules()):
            figures: dict[str, Any] = asdict(losses_by_mode(model, blocks, batch_size, most_tokens))
            if len(_rows(blocks, most_tokens)) > 1:
                effect = future_effect(model, blocks, batch_size, most_tokens, as_in_training=True)
                figures["future"] = asdict(effect)
            if kind is ExpertChoiceMoE:
                with every_expert(model):
                    figures["loss_alone"], _ = mean_loss(model, draw_batches(blocks, batch_size, most_tokens))
            return {name: figures}
    return {}


def measure_modes(run: Run, model: nn.Module, texts: Texts) -> dict[str, dict[str, Any]]:
    """`evaluate_modes` on the first validation tokens, for the rows of a study."""
    settings = run.settings
    blocks = PackedBlocks(texts.validation, settings.context, settings.document_mask)
    return evaluate_modes(model, blocks, settings.batch_size, MODES_TOKENS)


@contextmanager
def _mixtures_choose(model: nn.Module, eval_choice: str, all_experts: bool = False) -> Iterator[None]:
    """Sets who chooses in the expert-choice layers, and with `all_experts` that a token gets all of them."""
    mixtures = [module for module in model.modules() if isinstance(module, ExpertChoiceMoE)]
    before = [(mixture.eval_choice, mixture.capacity_factor) for mixture in mixtures]
    for mixture in mixtures:
        mixture.eval_choice = eval_choice
        if all_experts:
            mixture.capacity_factor = mixture.num_experts
    try:
        yield
    finally:
        for mixture, (choice, factor) in zip(mixtures, before, strict=True):
            mixture.eval_choice, mixture.capacity_factor = choice, factor


@contextmanager
def choice_of_training(model: nn.Module) -> Iterator[None]:
    """Lets layers choose experts as in training, all else in evaluation; the model comes back as it was."""
    norms = [module for module in model.modules() if isinstance(module, MaskedBatchNorm)]
    statistics = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    with evaluation_mode(model), _mixtures_choose(model, "expert"):
        for module in model.modules():
            # The retrieval too: on few tokens, its fused evaluation knows the running statistics alone.
            if isinstance(module, MaskedBatchNorm | ProductKeyRetrieval):
                module.training = True
        try:
            yield
        finally:
            for norm, before in zip(norms, statistics, strict=True):
                for buffer, value in zip(norm.buffers(), before, strict=True):
                    buffer.copy_(value)


@contextmanager
def every_expert(model: nn.Module) -> Iterator[None]:
    """Evaluation in which every expert takes every token of the expert-choice layers, as each does with the
    one token that a step of generation shows it under `eval_choice="expert"`."""
    with evaluation_mode(model), _mixtures_choose(model, "token", all_experts=True):
        yield


def losses_by_mode(model: nn.Module, blocks: PackedBlocks, batch_size: int, most_tokens: int) -> ModeLosses:
    """The loss when layers choose as in training, and as in evaluation.

    Args:
        model: a causal language model of transformers; its weights, statistics and modes stay.
        blocks: text in rows; of each, all tokens but the first are predicted.
        batch_size: rows of a batch, as in training: so many decide about each other.
        most_tokens: read the first so many tokens, rounded up to whole rows; fewer where there are fewer.
    """
    batches = draw_batches(blocks, batch_size, most_tokens)
    with choice_of_training(model):
        train_mode, tokens = mean_loss(model, batches)
    with evaluation_mode(model):
        eval_mode, _ = mean_loss(model, batches)
    return ModeLosses(train_mode, eval_mode, tokens)


def future_effect(
    model: nn.Module, blocks: PackedBlocks, batch_size: int, most_tokens: int, as_in_training: bool
) -> FutureEffect:
    """What predictions owe to later tokens: the second half of every row gives way to another row's.

    Args:
        model, batch_size, most_tokens: as in `losses_by_mode`; half of the tokens are the other text.
        blocks: two rows at least; the text that comes in stands in no row of the batch.
        as_in_training: whether layers choose as in training; else nothing should change.

    Raises:
        ValueError: too little text for two batches of one row.
    """
    rows = _rows(blocks, most_tokens)
    batch_size = min(batch_size, len(rows) // 2)
    if batch_size < 1:
        raise ValueError(f"blocks must hold at least 2 rows of text, got {len(rows)}")
    half = blocks.block_size // 2
    if half < 2:
        raise ValueError(f"blocks must have rows of at least 4 tokens, got {blocks.block_size}")
    batches = [_collate(blocks, chosen) for chosen in rows.split(batch_size) if len(chosen) == batch_size]
    squares, largest, divergence, own, other, count = 0.0, 0.0, 0.0, 0.0, 0.0, 0
    with choice_of_training(model) if as_in_training else evaluation_mode(model), torch.inference_mode():
        for batch, stranger in zip(batches[::2], batches[1::2], strict=False):
            ids = batch["input_ids"]
            changed = {**batch, "input_ids": torch.cat([ids[:, :half], stranger["input_ids"][:, half:]], 1)}
            before_BLV, after_BLV = (_logits(model, b)[:, :half] for b in (batch, changed))
            difference = (after_BLV - before_BLV).double()
            squares += difference.square().mean(-1).sum().item()
            largest = max(largest, difference.abs().max().item())
            logs = [x.double().log_softmax(-1) for x in (before_BLV, after_BLV)]
            divergence += F.kl_div(logs[1], logs[0], log_target=True, reduction="sum").item()
            # The last place of the half predicts what has been replaced.
            targets = ids[:, 1:half, None]
            own -= logs[0][:, :-1].gather(2, targets).sum().item()
            other -= logs[1][:, :-1].gather(2, targets).sum().item()
            count += len(ids)
    places, tokens = count * half, count * (half - 1)
    return FutureEffect(
        logit_change=(squares / places) ** 0.5,
        largest_logit_change=largest,
        divergence=max(0.0, divergence / places),  # rounding makes sums of nothing slightly negative
        loss_own_future=own / tokens,
        loss_other_future=other / tokens,
        tokens=tokens,
    )


def draw_batches(blocks: PackedBlocks, batch_size: int, most_tokens: int) -> list[Batch]:
    """The first rows of a text that hold `most_tokens`, or all, in batches; always the same ones.

    Rows are shuffled, as in training: the rows of one long document would be a batch of their own kind.
    """
    return [_collate(blocks, chosen) for chosen in _rows(blocks, most_tokens).split(batch_size)]


def mean_loss(model: nn.Module, batches: list[Batch]) -> tuple[float, int]:
    """Nats per predicted token in the mode that the model is in, and how many were predicted."""
    nats, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            logits_BLV = _logits(model, batch)[:, :-1]
            targets = batch["input_ids"][:, 1:]
            losses = F.cross_entropy(logits_BLV.flatten(0, 1), targets.flatten(), reduction="none")
            nats += losses.double().sum().item()
            tokens += targets.numel()
    return nats / tokens, tokens


def _rows(blocks: PackedBlocks, most_tokens: int) -> Tensor:
    count = min(len(blocks), -(-most_tokens // blocks.block_size))
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _collate(blocks: PackedBlocks, chosen: Tensor) -> Batch:
    rows = [blocks[row] for row in chosen.tolist()]
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids")}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    return model(**inputs, use_cache=False).logits.float().cpu()
