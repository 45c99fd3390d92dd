"""A training run from settings to figures."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from million_experts._terminal import Terminal
from million_experts.lm.callbacks import (
    ExpertUsageCallback,
    InterruptCallback,
    ProgressCallback,
    RunFolderCallback,
)
from million_experts.lm.checkpoints import check_checkpoint, list_checkpoints
from million_experts.lm.data import digests, has_tokenizer, prepare_data, remember_splits
from million_experts.lm.files import explained, make_folder, save_whole
from million_experts.lm.memory import available_memory, expected_peak, keep_freed_memory, takes_bfloat16
from million_experts.lm.packing import PackedBlocks, TokenStream
from million_experts.lm.report import measure, print_results, read_results, show_results
from million_experts.lm.run_folder import hold, is_finished, resume_command
from million_experts.lm.settings import SETTINGS_FILE, TrainSettings
from million_experts.lm.trainer import LanguageModelTrainer
from million_experts.models import PeerConfig, PeerForCausalLM, count_parameters, memory_estimate
from million_experts.models.attention import with_fast_attention
from million_experts.models.feed_forwards import FEED_FORWARDS
from million_experts.models.versions import name_here
from million_experts.optim import RowwiseAdamW, parameter_groups
from million_experts.optim.stored_state import refuse_misfits


def train(settings: TrainSettings, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains a language model as the settings say; returns what stands in the run's `results.json`.

    The run's folder then holds the model and tokenizer (`from_pretrained` reads them), checkpoints, metrics,
    `results.json`, `loss.png` and `expert_usage.png`. Under `torchrun` each process trains on `batch_size`
    sequences of its own; the first one prints, writes and measures.

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
        OSError: something could not be written, and the last checkpoint is whole; or another process trains
            in `output_dir`.
        KeyboardInterrupt: the run was interrupted; a checkpoint has been saved.
    """
    ranks = PartialState(cpu=not torch.accelerator.is_available())
    console = (console or Terminal()) if ranks.is_main_process else Terminal(quiet=True)
    disable_progress_bar()  # transformers' and datasets' own: ours shows what matters
    datasets.disable_progress_bars()
    keep_freed_memory()
    if settings.output_dir is None:
        raise ValueError("output_dir must name the folder of the run, got None")
    run = Path(settings.output_dir)
    finished = is_finished(run, settings, resume)
    ranks.wait_for_everyone()  # before one of them writes to the folder
    if not finished:
        processes = ranks.num_processes
        print_plan(model_config(settings, settings.vocab_size), settings, console, processes)
        _check_reporters(settings.report_to)
        make_folder("output_dir", run)
        make_folder("cache_dir", Path(settings.cache_dir).expanduser())
        with hold(run) if ranks.is_main_process else nullcontext(lambda: None) as check_folder:
            ranks.wait_for_everyone()
            finished = is_finished(run, settings, resume)  # another process may have been at it until now
            if not finished:
                return _train(settings, run, ranks, console, check_folder)
    console.print(f"{run} is finished; its results:", style="bold", markup=False, soft_wrap=True)
    return show_results(run, console)


def _train(
    settings: TrainSettings,
    run: Path,
    ranks: PartialState,
    console: Console,
    check_folder: Callable[[], None],
) -> dict[str, Any]:
    """Trains from the newest checkpoint, or from the start, to the end; `check_folder` as `hold` gives it."""
    processes = ranks.num_processes
    with ranks.main_process_first():  # it fills the cache
        streams, tokenizer = prepare_data(settings, run, console, processes)
    if processes > 1 and len(set(gather_object([digests(streams)["train"]]))) > 1:
        raise ValueError("data must be the same text in every process; the training splits differ")
    model = build_model(settings, tokenizer)
    trainer = _make_trainer(settings, run, model, tokenizer, streams)
    checkpoint, step = None, 0
    if found := list_checkpoints(run):
        step, checkpoint = found[-1]
        check_checkpoint(checkpoint, model, processes)
        console.print(f"Going on from {checkpoint}", style="bold", markup=False, soft_wrap=True)
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        # From here on the folder is a run that can be resumed; what went wrong before left no trace in it.
        settings.save(run / SETTINGS_FILE)
        remember_splits(run, streams)
        if not has_tokenizer(run):
            save_whole(tokenizer.save_pretrained, run, "the tokenizer")
    progress = ProgressCallback(settings.tokens_per_step(processes), console)
    interrupt = InterruptCallback()
    trainer.add_callback(progress)
    trainer.add_callback(interrupt)
    trainer.add_callback(RunFolderCallback(check_folder))  # after those that ask for a checkpoint
    start = time.monotonic()
    try:
        # Checkpoints say themselves what kept them from being written.
        with explained("metrics", run, f"Make room there, then go on with: {resume_command(run)}"):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interrupt.restore()
        progress.stop()
    if interrupt.interrupted:
        raise KeyboardInterrupt(
            f"Stopped after step {trainer.state.global_step} of {settings.steps}; "
            f"the checkpoint is in {run}. Go on with: {resume_command(run)}"
        )
    seconds = time.monotonic() - start
    trainer.flush()
    check_folder()
    if ranks.is_main_process:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        save_whole(trained.save_pretrained, run, "the model")
        with console.status("measuring on the test split"):
            history = trainer.state.log_history
            results = measure(
                settings,
                run,
                trained,
                tokenizer,
                streams,
                history,
                seconds,
                step,
                processes,
                check_folder,
            )
        print_results(results, console)
    ranks.wait_for_everyone()
    return read_results(run)


def fit(
    settings: TrainSettings,
    model: PeerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, TokenStream],
    callbacks: Iterable[TrainerCallback] = (),
) -> tuple[list[dict[str, float]], float]:
    """Trains a model in this process and leaves nothing on disk: no checkpoint, no metrics, no evaluation.

    The steps are those of `train` with the same settings, text and seed.

    Args:
        model: of `build_model`; it is trained in place.
        streams: "train" and "validation", of which the latter must hold one sequence and is not read.
        callbacks: told of every step; one that raises ends the training.

    Returns:
        The trainer's log and the seconds that training took.

    Raises:
        FloatingPointError: the loss or a gradient was no longer finite.
    """
    keep_freed_memory()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as nowhere:
        settings = dataclasses.replace(settings, report_to=["none"])
        trainer = _make_trainer(settings, Path(nowhere), model, tokenizer, streams, watch=False)
        for callback in callbacks:
            trainer.add_callback(callback)
        start = time.monotonic()
        trainer.train()
        trainer.flush()
        return trainer.state.log_history, time.monotonic() - start


def build_model(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> PeerForCausalLM:
    """The untrained model of the settings; their seed decides its weights and, later, dropout.

    Args:
        vocab_size: rows of the embedding, by default as many as `tokenizer` has tokens.
    """
    set_seed(settings.seed)
    config = model_config(settings, len(tokenizer) if vocab_size is None else vocab_size)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    return with_fast_attention(PeerForCausalLM(config), takes_bfloat16(settings.precision))


def model_config(settings: TrainSettings, vocab_size: int) -> PeerConfig:
    """The configuration of the model that the settings describe."""
    kinds = settings.mlp_layer_types
    if isinstance(kinds, list) and len(kinds) == 1:
        kinds = kinds[0]
    arguments: dict[str, Any] = {kind: getattr(settings, kind) or None for kind in FEED_FORWARDS}
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
        **arguments,
    )


def _check_reporters(names: list[str]) -> None:
    """Finds out whether metrics can be reported before any work is done."""
    if names in (["none"], ["all"]):
        return
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"report_to={', '.join(names)} does not work here: {error}") from error


def print_plan(config: PeerConfig, settings: TrainSettings, console: Console, processes: int = 1) -> None:
    """Prints what will be trained and what it will take; refuses what cannot fit.

    Args:
        processes: that train together, of which this machine's share its memory.

    Raises:
        MemoryError: the expected peak is above the memory that is available.
    """
    count, memory = count_parameters(config), memory_estimate(config)
    peak, available = expected_peak(config, settings), available_memory()
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("model", f"{count.label}: {count.total:,} parameters, {count.active:,} active for a token")
    table.add_row("feed-forwards", ", ".join(config.mlp_layer_types or []))
    table.add_row("expert tables", f"{count.tables:,} parameters, {memory.table_weights / 1e9:.2f} GB")
    table.add_row("training", f"{settings.steps:,} steps of {settings.tokens_per_step(processes):,} tokens")
    table.add_row("precision", "bfloat16 autocast" if takes_bfloat16(settings.precision) else "float32")
    table.add_row("memory", f"{peak / 1e9:.1f} GB expected at the peak, {available / 1e9:.1f} GB available")
    console.print(table)
    check_memory(config, settings)


def check_memory(config: PeerConfig, settings: TrainSettings) -> None:
    """Refuses a run that cannot fit; the processes that torchrun started here share the memory.

    Raises:
        MemoryError: the expected peak is above the memory that is available.
    """
    here = 1 if torch.cuda.is_available() else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    peak, available = expected_peak(config, settings), available_memory()
    if here * peak > available:
        each = f", each of {here} processes," if here > 1 else ""
        raise MemoryError(
            f"the run{each} is expected to take {peak / 1e9:.1f} GB at its peak and {available / 1e9:.1f} GB "
            "are available: use fewer experts (--peer num_experts=...), a smaller --batch-size with more "
            "--gradient-accumulation-steps, or --gradient-checkpointing"
        )


def make_optimizer(model: PeerForCausalLM, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW with the rates, decays and betas of the settings; `RowwiseAdamW` if gradients may be sparse."""
    groups = parameter_groups(
        model,
        settings.learning_rate,
        settings.peak_table_learning_rate,
        settings.weight_decay,
        settings.table_weight_decay,
        (settings.table_adam_beta1, settings.adam_beta2),
        settings.peak_retrieval_learning_rate,
    )
    betas = (settings.adam_beta1, settings.adam_beta2)
    if any(getattr(settings, kind).get("sparse_grad") for kind in FEED_FORWARDS):
        return RowwiseAdamW(
            groups, betas=betas, second_moment=settings.table_second_moment, seed=settings.seed
        )
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    optimizer.register_load_state_dict_pre_hook(refuse_misfits)
    return optimizer


def _make_trainer(
    settings: TrainSettings,
    run: Path,
    model: PeerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    streams: dict[str, TokenStream],
    watch: bool = True,
) -> LanguageModelTrainer:
    """A trainer; without `watch` it neither evaluates nor writes checkpoints on its way."""
    name = name_here(TrainingArguments, "activation_checkpointing", "gradient_checkpointing")
    checkpointing: dict[str, Any] = {name: settings.gradient_checkpointing}
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
        **checkpointing,
        torch_compile=settings.torch_compile,
        ddp_find_unused_parameters=False,  # every block uses all of its own
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if watch else "no",
        eval_steps=settings.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps" if watch else "no",
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
        optimizers=(make_optimizer(model, settings), None),
        sync_query_norm=settings.sync_query_norm,
    )
    trainer.remove_callback(PrinterCallback)
    if watch:
        trainer.add_callback(ExpertUsageCallback(trainer))
    return trainer
