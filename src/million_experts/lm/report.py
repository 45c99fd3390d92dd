"""What a run came to: measured on its test split, kept in its folder, printed."""

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from million_experts.layers import ExpertUsage
from million_experts.lm.callbacks import retrieval_layers
from million_experts.lm.figures import loss_figure, resources_figure, usage_figure
from million_experts.lm.files import write_whole
from million_experts.lm.generation import TEMPERATURE, write_sample
from million_experts.lm.ngram import bigram_nats, unigram_nats
from million_experts.lm.packing import TokenStream
from million_experts.lm.run_folder import RESULTS_FILE
from million_experts.lm.scoring import Score, score_documents
from million_experts.lm.settings import TrainSettings
from million_experts.models import PeerForCausalLM, count_parameters


def measure(
    settings: TrainSettings,
    run: Path,
    model: PeerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, TokenStream],
    history: list[dict[str, float]],
    training_seconds: float,
    resumed_from_step: int = 0,
    processes: int = 1,
    check_folder: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures a trained model on the test split, which nothing has been chosen by.

    Args:
        history: the trainer's log.
        training_seconds: of this process; `resumed_from_step` says whether others trained before.
        resumed_from_step: step of the checkpoint that this process went on from, 0 for none.
        processes: that trained together.
        check_folder: called before anything is written; it raises where the folder is no longer the run's.

    Returns:
        What it writes to the run's `results.json`, beside the figures.
    """
    test, tokens_per_step = streams["test"], settings.tokens_per_step(processes)
    with ExitStack() as stack:
        usages = {
            name: stack.enter_context(ExpertUsage(layer)) for name, layer in retrieval_layers(model).items()
        }
        score = score_documents(
            model, test, context=settings.context, batch_tokens=settings.tokens_per_micro_batch
        )
    yardsticks = {
        "unigram": unigram_nats(streams["train"], test),
        "interpolated bigram": bigram_nats(streams["train"], test),
    }
    sample = write_sample(model, tokenizer, settings.prompt, min(120, settings.context // 2), settings.seed)
    count = count_parameters(model)
    results: dict[str, Any] = {
        "parameters": {"label": count.label, "total": count.total, "active": count.active},
        "steps": settings.steps,
        "tokens_per_step": tokens_per_step,
        "training_seconds": round(training_seconds, 1),
        "resumed_from_step": resumed_from_step,
        "test": _figures(score),
        "yardsticks": {
            name: _figures(Score(nats, score.tokens, score.bytes)) for name, nats in yardsticks.items()
        },
        "expert_usage": {name: dataclasses.asdict(usage.figures()) for name, usage in usages.items()},
        "sample": sample,
        "history": history,
        "figures": [str(run / "loss.png"), str(run / "resources.png")],
    }
    check_folder()
    lines = {name: row["bits_per_byte"] for name, row in results["yardsticks"].items()}
    loss_figure(
        history,
        score.tokens / math.log(2) / score.bytes,
        {**lines, "test, this model": score.bits_per_byte},
        f"{run.name}: {count.label}",
        run / "loss.png",
    )
    resources_figure(history, tokens_per_step, f"{run.name}: {count.label}", run / "resources.png")
    if usages:
        usage_figure(usages, f"{run.name}: experts used on the test split", run / "expert_usage.png")
        results["figures"].append(str(run / "expert_usage.png"))
    write_whole(run / RESULTS_FILE, json.dumps(results, indent=1))
    return results


def read_results(run: Path) -> dict[str, Any]:
    """What `measure` wrote to a run's folder.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and measure again by --resume") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} is damaged: it must hold figures by name, got {type(results).__name__}")
    return results


def show_results(run: Path, console: Console) -> dict[str, Any]:
    """Prints what `measure` wrote to a run's folder, and returns it.

    Raises:
        ValueError: the file is damaged.
    """
    results = read_results(run)
    try:
        print_results(results, console)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{run / RESULTS_FILE} is damaged ({error!r}): remove it and measure again by --resume"
        ) from error
    return results


def print_results(results: dict[str, Any], console: Console) -> None:
    """Prints what a run came to."""
    test = results["test"]
    table = Table(title=f"Test split, {test['tokens']:,} tokens", title_justify="left")
    for column in ("", "nats per token", "perplexity", "bits per byte"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {f"this model, {results['parameters']['label']}": test, **results["yardsticks"]}
    for i, (name, row) in enumerate(rows.items()):
        table.add_row(
            name,
            f"{row['loss']:.3f}",
            f"{math.exp(row['loss']):.1f}",
            f"{row['bits_per_byte']:.3f}",
            style="bold" if i == 0 else "",
        )
    console.print(table)
    for name, figures in results["expert_usage"].items():
        console.print(
            f"{name}: {figures['usage']:.1%} of the experts used, "
            f"unevenness {figures['unevenness']:.2f} nats, "
            f"busiest expert {figures['top_share']:.2%} of the gate mass",
            soft_wrap=True,
        )
    sample = escape(results["sample"])
    console.print(
        f"\n[bold]Sample[/bold] (temperature {TEMPERATURE})\n{sample}\n", highlight=False, soft_wrap=True
    )
    console.print("Figures: " + ", ".join(results["figures"]), markup=False, soft_wrap=True)


def _figures(score: Score) -> dict[str, float]:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }
