"""The command line, `million-experts`. Commands import what they need when they run, so help is quick."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    import yaml
    from rich.markup import escape
    from rich.table import Table

    from million_experts._terminal import (
        Terminal,
        errors,
        escape_what_cannot_be_encoded,
        printable,
        user_errors,
    )
except ImportError as error:
    raise SystemExit(
        f'the command line needs {error.name}: pip install "million-experts[train,data]"'
    ) from error

from million_experts.benchmarks.command import bench
from million_experts.lm.command import train_command
from million_experts.lm.settings import (
    DEFAULT_CACHE,
    SETTINGS_FILE,
    TrainSettings,
    load_preset,
    preset_names,
)
from million_experts.studies import command as studies

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from million_experts.lm.packing import TokenStream
    from million_experts.lm.scoring import Score


class _App(typer.Typer):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        escape_what_cannot_be_encoded()
        return super().__call__(*args, **kwargs)


app = _App(
    help="Language models with a million tiny experts: train, measure and use them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Terminal()

Model = Annotated[str, typer.Argument(help="Folder of a run or of any saved causal language model.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Corpus, as in `train`; repeat for several. By default the test split of the run's own corpus."
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of the text in JSONL, Parquet and hub data.")]
MaxDocuments = Annotated[
    int | None, typer.Option(min=1, help="With --data: the first so many documents of each corpus alone.")
]
CacheDir = Annotated[str, typer.Option(help="Folder of tokenised text.")]
BatchTokens = Annotated[int, typer.Option(help="Most tokens of a batch; fewer take less memory.")]
Context = Annotated[
    int | None, typer.Option(help="Most tokens the model sees at once; by default what it was made for.")
]


@app.command()
def evaluate(
    model: Model,
    data: Data = None,
    text_column: TextColumn = "text",
    max_documents: MaxDocuments = None,
    context: Context = None,
    batch_tokens: BatchTokens = 8192,
    cache_dir: CacheDir = DEFAULT_CACHE,
    json_output: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")] = False,
) -> None:
    """Measure perplexity and bits per byte of a model on any text."""
    with user_errors():
        language_model, tokenizer = _load(model)
        stream, source = _stream(model, tokenizer, data, text_column, max_documents, cache_dir)
        score = _score(language_model, stream, source, context, batch_tokens)
        figures = {
            "data": source,
            "tokens": score.tokens,
            "bytes": score.bytes,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
        }
        if json_output:
            typer.echo(json.dumps(figures))
            return
        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_column()
        table.add_column(overflow="fold")  # paths are longer than lines
        table.add_row("text", f"{escape(source)}: {score.tokens:,} tokens, {score.bytes:,} bytes")
        table.add_row("loss", f"{score.loss:.4f} nats per token")
        table.add_row("perplexity", f"{score.perplexity:.2f} per token")
        table.add_row("bits per byte", f"{score.bits_per_byte:.4f}")
        console.print(table)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "The",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 120,
    temperature: Annotated[
        float, typer.Option(min=0, help="Above 1 more varied, below 1 safer; 0 always takes the likeliest.")
    ] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Write text with a model."""
    with user_errors():
        from million_experts.lm.generation import write_sample
        from million_experts.lm.loading import said_of

        language_model, tokenizer = _load(model)
        with said_of(model, "something that text cannot be written with"):
            text = write_sample(language_model, tokenizer, prompt, max_new_tokens, seed, temperature, top_p)
        typer.echo(printable(text, sys.stdout.encoding))


@app.command()
def inspect(
    model: Model,
    data: Data = None,
    text_column: TextColumn = "text",
    max_documents: MaxDocuments = None,
    context: Context = None,
    batch_tokens: BatchTokens = 8192,
    cache_dir: CacheDir = DEFAULT_CACHE,
    figure: Annotated[
        Path | None,
        typer.Option(help="Where the PNG goes; by default the model's folder, under the name of --data."),
    ] = None,
) -> None:
    """Show how a model uses its experts: usage and unevenness as in the paper, by layer and head."""
    with user_errors():
        from contextlib import ExitStack

        from million_experts.layers import ExpertUsage
        from million_experts.lm.callbacks import retrieval_layers
        from million_experts.lm.figures import usage_figure

        language_model, tokenizer = _load(model)
        layers = retrieval_layers(language_model)
        if not layers:
            raise ValueError(f"model {model} has no PEER layer to inspect")
        stream, source = _stream(model, tokenizer, data, text_column, max_documents, cache_dir)
        with ExitStack() as stack:
            usages = {name: stack.enter_context(ExpertUsage(layer)) for name, layer in layers.items()}
            _score(language_model, stream, source, context, batch_tokens)
        table = Table(title=f"{escape(source)}: {len(stream):,} tokens", title_justify="left")
        for column in ("layer", "head", "experts", "usage", "unevenness (nats)", "top share"):
            table.add_column(column, justify="left" if column in ("layer", "head") else "right")
        for name, usage in usages.items():
            for head in [None, *range(usage.layer.num_heads)]:
                figures = usage.figures(head)
                table.add_row(
                    name if head is None else "",
                    "all" if head is None else str(head),
                    f"{usage.layer.num_experts:,}" if head is None else "",
                    f"{figures.usage:.2%}",
                    f"{figures.unevenness:.3f}",
                    f"{figures.top_share:.3%}",
                    style="bold" if head is None else "",
                )
        console.print(table)
        # The run's own figure is that of its test split.
        name = re.sub(r"\W+", "-", " ".join(["expert_usage", *(data or [])]))
        path = figure or Path(model) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        usage_figure(usages, f"Experts used on {source}", path)
        console.print(f"Figure: {path}", markup=False, soft_wrap=True)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="Preset or folder of a model, to show its size and memory too.")
    ] = None,
) -> None:
    """Show versions, the backends that run here and why others do not, and a model's size and memory."""
    import platform

    import torch

    import million_experts
    from million_experts.ops import available_backends, resolve_backend

    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # paths are longer than lines
    table.add_row("million-experts", million_experts.__version__)
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    for package in ("transformers", "tokenizers", "datasets", "accelerate", "numpy", "triton"):
        table.add_row(package, _version(package))
    table.add_row(
        "processor", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    table.add_row("cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else "not available")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for name, reason in available_backends().items():
        taken = [device for device in devices if resolve_backend("auto", device) == name]
        chosen = f" (auto takes it on {' and '.join(taken)})" if taken else ""
        table.add_row(f"backend {name}", f"runs{chosen}" if reason is None else f"does not run: {reason}")
    if available_backends()["cpu"] is None:
        from million_experts.ops import cpu

        others = ", ".join(cpu.instruction_sets()[:-1])
        table.add_row("cpu kernels", cpu.instruction_set() + (f" (also runs: {others})" if others else ""))
        table.add_row("OpenMP runtime", cpu.OPENMP or "none from torch: kernels run on one thread")
        table.add_row("huge pages", cpu.huge_pages())
    console.print(table)
    if model is not None:
        with user_errors():
            _print_size(model)


def _print_size(model: str) -> None:
    from million_experts.lm.loading import load_config
    from million_experts.models import PeerConfig, count_parameters, memory_estimate

    settings = load_preset(model) if model in preset_names() else None
    if settings is not None:
        from million_experts.lm.training import model_config

        config = model_config(settings, settings.vocab_size)
    else:
        _require_folder(model, f", or a preset ({', '.join(preset_names())})")
        loaded = load_config(model)
        if not isinstance(loaded, PeerConfig):
            raise ValueError(f"model {model} must be a PEER model for its size, got {loaded.model_type!r}")
        config = loaded
    count, memory = count_parameters(config), memory_estimate(config)
    table = Table(title=f"{escape(model)}: {count.label}", title_justify="left")
    for column in ("", "parameters", "weights", "gradients", "AdamW state"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "expert tables": (
            count.tables,
            memory.table_weights,
            memory.table_gradients,
            memory.table_optimizer,
        ),
        "everything else": (
            count.total - count.tables,
            memory.other_weights,
            memory.other_gradients,
            memory.other_optimizer,
        ),
    }
    rows["total"] = tuple(sum(column) for column in zip(*rows.values(), strict=True))
    for name, (parameters, *sizes) in rows.items():
        table.add_row(name, f"{parameters:,}", *(f"{size / 1e6:,.1f} MB" for size in sizes))
    table.add_row("active for a token", f"{count.active:,}")
    console.print(table)
    if settings is not None:
        console.print(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False), markup=False)


def _load(model: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from million_experts.lm.loading import load_model, load_tokenizer

    _require_folder(model)
    return load_model(model), load_tokenizer(model)


def _require_folder(model: str, or_preset: str = "") -> None:
    if not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(
            f"model must be a folder with a config.json, such as a finished run's{or_preset}, got {model!r}"
        )


def _stream(
    model: str,
    tokenizer: "PreTrainedTokenizerBase",
    data: list[str] | None,
    text_column: str,
    max_documents: int | None,
    cache_dir: str,
) -> "tuple[TokenStream, str]":
    """Tokens of the corpora, or of the test split of the run in `model`, and what to call them."""
    from million_experts.lm.data import load_stream, load_test_stream

    stored = Path(model) / SETTINGS_FILE
    settings = TrainSettings.load(stored) if stored.exists() else None
    if data:
        stream = load_stream(data, text_column, tokenizer, cache_dir, max_documents)
        return stream, ", ".join(data)
    if max_documents is not None:
        raise ValueError("max_documents goes with data, got none: the test split is scored whole")
    if settings is None:
        raise ValueError(f"data must be given: {model} is no run with a test split of its own")
    # The settings of a run may be a stranger's: they do not say where this user's files go.
    settings.cache_dir = cache_dir
    return load_test_stream(settings, tokenizer, Path(model)), "test split of the run"


def _score(
    model: "PreTrainedModel", stream: "TokenStream", source: str, context: int | None, batch_tokens: int
) -> "Score":
    """Scores documents and shows how long that takes: large corpora take a small machine hours."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from million_experts.lm.scoring import score_documents

    columns = BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(), TimeRemainingColumn()
    terminal = errors.is_terminal  # elsewhere a bar would leave empty lines
    with Progress(*columns, console=errors, transient=True, disable=not terminal) as bar:
        task = bar.add_task("", total=len(stream), start=False)

        def progress(done: int, total: int) -> None:
            if not bar.tasks[task].started:  # the arguments were right
                errors.print(f"Scoring {total:,} tokens: {escape(source)}", highlight=False, soft_wrap=True)
                bar.start_task(task)
            bar.update(task, completed=done)

        return score_documents(
            model, stream, context=_context(model, context), batch_tokens=batch_tokens, progress=progress
        )


def _context(model: "PreTrainedModel", context: int | None) -> int:
    if context is not None:
        return context
    return int(getattr(model.config, "max_position_embeddings", 1024))


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


app.command("train")(user_errors()(train_command()))
app.command("bench")(user_errors()(bench))
study = typer.Typer(help=studies.HELP, no_args_is_help=True, rich_markup_mode="rich")
for name, command in studies.COMMANDS.items():
    study.command(name)(user_errors()(command))
app.add_typer(study, name="study")


if __name__ == "__main__":
    app()
