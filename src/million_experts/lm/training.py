"""A training run from settings to figures."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from million_experts.layers import ExpertUsage
from million_experts.lm.callbacks import (
    ExpertUsageCallback,
    InterruptCallback,
    ProgressCallback,
    retrieval_layers,
)
from million_experts.lm.corpora import licenses, load_corpora, split_documents
from million_experts.lm.figures import loss_figure, usage_figure
from million_experts.lm.memory import available_memory, expected_peak, takes_bfloat16
from million_experts.lm.ngram import bigram_nats, unigram_nats
from million_experts.lm.packing import PackedBlocks, TokenStream, tokenize_documents
from million_experts.lm.scoring import Score, evaluation_mode, score_documents
from million_experts.lm.settings import DEFAULT_CACHE, TrainSettings, write_whole
from million_experts.lm.tokenizer import train_tokenizer
from million_experts.lm.trainer import LanguageModelTrainer, check_checkpoint, list_checkpoints
from million_experts.models import PeerConfig, PeerForCausalLM, count_parameters, memory_estimate
from million_experts.models.feed_forwards import FEED_FORWARDS
from million_experts.optim import parameter_groups

SETTINGS_FILE = "settings.yaml"
RESULTS_FILE = "results.json"
SPLITS = ("train", "validation", "test")


def train(settings: TrainSettings, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains a language model as the settings say; returns what stands in the run's `results.json`.

    The run's folder then holds the model and tokenizer (`from_pretrained` reads them), checkpoints, metrics,
    `results.json`, `loss.png` and `expert_usage.png`.

    Args:
        settings: what to do.
        resume: go on from the newest checkpoint of the run in `output_dir`; start where there is none.
        console: where progress is printed.

    Raises:
        ValueError: settings that contradict each other or the run that is resumed; a corpus that does not
            suit; a damaged checkpoint.
        FileExistsError: `output_dir` holds a run and `resume` is False.
        MemoryError: the run is expected to need more memory than there is.
        FloatingPointError: the loss was no longer finite.
        KeyboardInterrupt: the run was interrupted; a checkpoint has been saved.
    """
    console = console or Console()
    disable_progress_bar()  # transformers' and datasets' own: ours shows what matters
    datasets.disable_progress_bars()
    if settings.output_dir is None:
        raise ValueError("output_dir must name the folder of the run, got None")
    run = Path(settings.output_dir)
    if _finished(run, settings, resume):
        console.print(f"{run} is finished; its results:", style="bold", markup=False, soft_wrap=True)
        results = json.loads((run / RESULTS_FILE).read_text())
        print_results(results, console)
        return results
    print_plan(model_config(settings, settings.vocab_size), settings, console)
    _check_reporters(settings.report_to)
    run.mkdir(parents=True, exist_ok=True)

    streams, tokenizer = _prepare_data(settings, run, console)
    set_seed(settings.seed)
    config = model_config(settings, len(tokenizer))
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model = PeerForCausalLM(config)
    trainer = _make_trainer(settings, run, model, tokenizer, streams)
    checkpoint = None
    if found := list_checkpoints(run):
        checkpoint = found[-1][1]
        check_checkpoint(checkpoint, model)
        console.print(f"Going on from {checkpoint}", style="bold", markup=False, soft_wrap=True)
    # From here on the folder is a run that can be resumed; what went wrong before has left no trace in it.
    settings.save(run / SETTINGS_FILE)
    if not _has_tokenizer(run):
        _save_whole(tokenizer.save_pretrained, run)
    tokens = settings.tokens_per_micro_batch * settings.gradient_accumulation_steps
    progress, interrupt = ProgressCallback(tokens, console), InterruptCallback()
    trainer.add_callback(progress)
    trainer.add_callback(interrupt)
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interrupt.restore()
        progress.stop()
    if interrupt.interrupted:
        command = f"million-experts train --output-dir {shlex.quote(str(run))} --resume"
        raise KeyboardInterrupt(
            f"stopped after step {trainer.state.global_step} of {settings.steps}; "
            f"the checkpoint is in {run}. Go on with: {command}"
        )
    seconds = time.monotonic() - start
    results = _finish(settings, run, trainer, tokenizer, streams, seconds, console)
    print_results(results, console)
    return results


def model_config(settings: TrainSettings, vocab_size: int) -> PeerConfig:
    """The configuration of the model that the settings describe."""
    for kind in FEED_FORWARDS:
        _check_types(kind, getattr(settings, kind))
    kinds = settings.mlp_layer_types
    if isinstance(kinds, list) and len(kinds) == 1:
        kinds = kinds[0]
    return PeerConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=settings.context,
        mlp_layer_types=kinds,
        attention_dropout=settings.attention_dropout,
        tie_word_embeddings=settings.tie_word_embeddings,
        peer=settings.peer or None,
        dense=settings.dense or None,
    )


def _check_types(kind: str, given: dict[str, Any]) -> None:
    """Refuses text where a layer's argument is a number or a switch; the layers check the rest."""
    for name, value in given.items():
        default = FEED_FORWARDS[kind].arguments.get(name)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{kind}: {name} must be true or false, got {value!r}")
        if isinstance(default, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{kind}: {name} must be a number, got {value!r}")


def _check_reporters(names: list[str]) -> None:
    """Finds out whether metrics can be reported before any work is done."""
    if names in (["none"], ["all"]):
        return
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"report_to={', '.join(names)} does not work here: {error}") from error


def print_plan(config: PeerConfig, settings: TrainSettings, console: Console) -> None:
    """Prints what will be trained and what it will take; refuses what cannot fit.

    Raises:
        MemoryError: the expected peak is above the memory that is available.
    """
    count, memory = count_parameters(config), memory_estimate(config)
    peak, available = expected_peak(config, settings), available_memory()
    tokens = settings.tokens_per_micro_batch * settings.gradient_accumulation_steps
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("model", f"{count.label}: {count.total:,} parameters, {count.active:,} active for a token")
    table.add_row("feed-forwards", ", ".join(config.mlp_layer_types or []))
    table.add_row("expert tables", f"{count.tables:,} parameters, {memory.table_weights / 1e9:.2f} GB")
    table.add_row("training", f"{settings.steps:,} steps of {tokens:,} tokens")
    table.add_row("precision", "bfloat16 autocast" if takes_bfloat16(settings.precision) else "float32")
    table.add_row("memory", f"{peak / 1e9:.1f} GB expected at the peak, {available / 1e9:.1f} GB available")
    console.print(table)
    if peak > available:
        raise MemoryError(
            f"the run is expected to take {peak / 1e9:.1f} GB at its peak and {available / 1e9:.1f} GB are "
            "available: use fewer experts (--peer num_experts=...), a smaller --batch-size with more "
            "--gradient-accumulation-steps, or --gradient-checkpointing"
        )


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
    console.print(f"\n[bold]Sample[/bold] (temperature 0.8)\n{sample}\n", highlight=False, soft_wrap=True)
    console.print("Figures: " + ", ".join(results["figures"]), markup=False, soft_wrap=True)


def _finished(run: Path, settings: TrainSettings, resume: bool) -> bool:
    """Whether the run is over; raises where its folder must not be used as asked."""
    stored = run / SETTINGS_FILE
    if not stored.exists():
        # Hidden files may be what a run left that was killed before it began.
        if run.exists() and (not run.is_dir() or any(file.name[0] != "." for file in run.iterdir())):
            raise FileExistsError(
                f"output_dir {run} holds files that are not a run's; give another --output-dir"
            )
        return False
    if not resume:
        raise FileExistsError(
            f"output_dir {run} already holds a run: go on with it by --resume, or start another with "
            "another --output-dir"
        )
    differences = settings.differences(TrainSettings.load(stored))
    if differences:
        raise ValueError(
            f"the run in {run} was started with other settings, so it cannot be resumed with these: "
            + "; ".join(differences)
            + ". Leave them out to go on with the run, or start another with another --output-dir"
        )
    return (run / RESULTS_FILE).exists()


def _prepare_data(
    settings: TrainSettings, run: Path, console: Console
) -> tuple[dict[str, TokenStream], PreTrainedTokenizerBase]:
    for line in licenses(settings.data):
        console.print(f"licence  {line}", markup=False, highlight=False, soft_wrap=True)
    with console.status("reading text"):
        splits = _load_splits(settings)
    if _has_tokenizer(run):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(run)
    else:
        with console.status("training the tokenizer"):
            texts = (text for batch in splits["train"].iter(batch_size=256) for text in batch["text"])
            tokenizer = train_tokenizer(texts, settings.vocab_size)
    with console.status("tokenising"):
        streams = {name: _tokenize(splits[name], tokenizer, settings.cache_dir) for name in SPLITS}
    for name in ("train", "validation"):
        if len(streams[name]) < settings.context:
            raise ValueError(
                f"context={settings.context} asks for more tokens than the {name} split of the corpus has: "
                f"{len(streams[name])} in {len(streams[name].starts)} documents; use a smaller context or "
                "more data" + (", or a larger validation_share" if name == "validation" else "")
            )
    train = streams["train"]
    console.print(
        f"text     {sum(len(split) for split in splits.values()):,} documents; "
        + ", ".join(f"{name} {len(stream):,}" for name, stream in streams.items())
        + f" tokens; {train.text_bytes / len(train):.2f} bytes a token, vocabulary {len(tokenizer):,}",
        soft_wrap=True,
    )
    seen = settings.steps * settings.tokens_per_micro_batch * settings.gradient_accumulation_steps
    console.print(f"         the run reads the training split {seen / len(train):.1f} times")
    return streams, tokenizer


def _load_splits(settings: TrainSettings) -> dict[str, datasets.Dataset]:
    datasets.disable_progress_bars()
    documents = load_corpora(
        settings.data, text_column=settings.text_column, max_documents=settings.max_documents
    )
    return split_documents(
        documents, seed=settings.seed, validation=settings.validation_share, test=settings.test_share
    )


def _tokenize(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, cache_dir: str) -> TokenStream:
    return tokenize_documents(documents, tokenizer, Path(cache_dir).expanduser())


def load_stream(
    data: list[str], text_column: str, tokenizer: PreTrainedTokenizerBase, cache_dir: str = DEFAULT_CACHE
) -> TokenStream:
    """All documents of some corpora as a model's tokens."""
    datasets.disable_progress_bars()
    return _tokenize(load_corpora(data, text_column=text_column), tokenizer, cache_dir)


def load_test_stream(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """The test split of the run with these settings."""
    return _tokenize(_load_splits(settings)["test"], tokenizer, settings.cache_dir)


def _make_trainer(
    settings: TrainSettings,
    run: Path,
    model: PeerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, TokenStream],
) -> LanguageModelTrainer:
    table_rate = settings.table_learning_rate
    groups = parameter_groups(
        model,
        settings.learning_rate,
        4 * settings.learning_rate if table_rate is None else table_rate,
        settings.weight_decay,
        settings.table_weight_decay,
    )
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        bf16=takes_bfloat16(settings.precision),
        activation_checkpointing=settings.gradient_checkpointing,
        torch_compile=settings.torch_compile,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        report_to=settings.report_to,
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    blocks = {
        name: PackedBlocks(streams[name], settings.context, document_mask=settings.document_mask)
        for name in ("train", "validation")
    }
    trainer = LanguageModelTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ExpertUsageCallback(trainer))
    return trainer


def _finish(
    settings: TrainSettings,
    run: Path,
    trainer: LanguageModelTrainer,
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, TokenStream],
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    """Saves the model, then measures it on the test split, which nothing has read before."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    _save_whole(model.save_pretrained, run)
    test = streams["test"]
    with ExitStack() as stack, console.status("measuring on the test split"):
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
    history = trainer.state.log_history
    results: dict[str, Any] = {
        "parameters": {"label": count.label, "total": count.total, "active": count.active},
        "steps": trainer.state.global_step,
        "training_seconds": round(seconds, 1),
        "test": _figures(score),
        "yardsticks": {
            name: _figures(Score(nats, score.tokens, score.bytes)) for name, nats in yardsticks.items()
        },
        "expert_usage": {name: dataclasses.asdict(usage.figures()) for name, usage in usages.items()},
        "sample": sample,
        "history": history,
        "figures": [str(run / "loss.png")],
    }
    lines = {name: row["bits_per_byte"] for name, row in results["yardsticks"].items()}
    loss_figure(
        history,
        score.tokens / math.log(2) / score.bytes,
        {**lines, "test, this model": score.bits_per_byte},
        f"{run.name}: {count.label}",
        run / "loss.png",
    )
    if usages:
        usage_figure(usages, f"{run.name}: experts used on the test split", run / "expert_usage.png")
        results["figures"].append(str(run / "expert_usage.png"))
    write_whole(run / RESULTS_FILE, json.dumps(results, indent=1))
    return results


def _figures(score: Score) -> dict[str, float]:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }


def write_sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> str:
    """The prompt and what the model writes after it; greedy where temperature is 0."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    set_seed(seed)
    with evaluation_mode(model):
        tokens = model.generate(**inputs, generation_config=how)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _save_whole(save: Callable[[str], Any], run: Path) -> None:
    """Calls `save(folder)` on a temporary folder and moves its files into the run, each one whole."""
    partial = run / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    save(str(partial))
    for file in sorted(partial.iterdir()):
        os.replace(file, run / file.name)
    partial.rmdir()


def _has_tokenizer(run: Path) -> bool:
    # `_save_whole` moves this file last, so the other one is there too.
    return (run / "tokenizer_config.json").exists()
