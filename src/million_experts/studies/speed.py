"""Time and peak memory of training steps of whole language models, side by side."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from million_experts.benchmarks.memory import can_measure, measure_peaks
from million_experts.benchmarks.optimizers import AdamW, AsInTraining, Rowwise
from million_experts.benchmarks.steps import LanguageModel
from million_experts.benchmarks.timing import interleave, make_run, summarise, warm_up
from million_experts.benchmarks.workload import Competitor, Workload
from million_experts.lm.memory import takes_bfloat16
from million_experts.lm.packing import PackedBlocks, TokenStream
from million_experts.lm.settings import TrainSettings
from million_experts.lm.training import model_config
from million_experts.models import PeerForCausalLM
from million_experts.models.attention import with_fast_attention
from million_experts.models.feed_forwards import FEED_FORWARDS

REPETITIONS = 36


def language_model(
    shared: dict[Any, Any],
    *,
    settings: Mapping[str, Any],
    stream: TokenStream,
    context: int,
    tokens: int,
    vocab_size: int,
) -> Workload:
    """A new model of some settings, trained on random rows of a text as `million-experts train` does it."""
    own = TrainSettings(**settings)
    own = dataclasses.replace(own, context=context, vocab_size=vocab_size)
    blocks = PackedBlocks(stream, context, own.document_mask)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(blocks), (max(1, tokens // context),), generator=generator)
        rows = [blocks[row] for row in chosen.tolist()]
        ids, positions = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids"))
        return ids % vocab_size, positions  # the tiny copy that loads libraries has few embeddings

    sparse = any(getattr(own, kind).get("sparse_grad") for kind in FEED_FORWARDS)
    optimizer = Rowwise(second_moment=own.table_second_moment) if sparse else AdamW(fused=True)
    torch.manual_seed(own.seed)
    narrow = takes_bfloat16(own.precision)
    model = with_fast_attention(PeerForCausalLM(model_config(own, vocab_size)), narrow)
    return Workload(
        LanguageModel(model, narrow),
        draw,
        like_tokens=False,
        optimizer=AsInTraining(optimizer, own.max_grad_norm, (own.table_adam_beta1, own.adam_beta2)),
    )


def compare_steps(
    models: Mapping[str, TrainSettings],
    stream: TokenStream,
    console: Console,
    repetitions: int = REPETITIONS,
) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of a training step of each model.

    Steps are timed in this process, the models in turns, each round in another order; a model's memory is
    measured in a process of its own. Both are on new models: what they have learnt takes no time.

    Args:
        models: by name; the first is what the others are compared with.
        stream: text to train on.
        repetitions: steps of each that are timed.

    Returns:
        For each model "seconds" (median, q1, q3, repetitions), "time_ratio" (the median over rounds of its
        seconds over the first model's in the same round), "weight_bytes", and where the system shows peaks
        "added_bytes" above the weights, "peak_bytes" of weights and what is above them, and "memory_ratio".
    """
    competitors = {name: _competitor(name, settings, stream) for name, settings in models.items()}
    with console.status("timing training steps, the models in turns"):
        workloads = {name: c.build({}, **c.arguments) for name, c in competitors.items()}
        runs = {name: make_run(workload, "step") for name, workload in workloads.items()}
        for run in runs.values():
            warm_up(run)
        seconds = dict(interleave(runs, repetitions, math.inf))
    weights = {
        name: sum(p.numel() * p.element_size() for p in workload.module.parameters())
        for name, workload in workloads.items()
    }
    del workloads, runs
    first = next(iter(models))
    figures: dict[str, dict[str, Any]] = {
        name: {
            "seconds": dataclasses.asdict(summarise(times)),
            "time_ratio": statistics.median(a / b for a, b in zip(times, seconds[first], strict=True)),
            "weight_bytes": weights[name],
        }
        for name, times in seconds.items()
    }
    if can_measure():
        with console.status("measuring the peak memory of training steps, a process each"):
            for name, competitor in competitors.items():
                peak = measure_peaks(competitor, ("step",), torch.get_num_threads())["step"]
                figures[name] |= {"added_bytes": peak.added, "peak_bytes": weights[name] + peak.added}
        for figure in figures.values():
            figure["memory_ratio"] = figure["peak_bytes"] / figures[first]["peak_bytes"]
    return figures


def _competitor(name: str, settings: TrainSettings, stream: TokenStream) -> Competitor:
    return Competitor(
        name,
        language_model,
        {
            "settings": dataclasses.asdict(settings),
            "stream": stream,
            "context": settings.context,
            "tokens": settings.tokens_per_micro_batch,
            "vocab_size": settings.vocab_size,
        },
    )
