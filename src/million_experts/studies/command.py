"""`million-experts study ...`. Light to import, so that the command line's help stays quick."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from million_experts._terminal import Terminal
from million_experts.lm.settings import (
    DEFAULT_CACHE,
    RETRIEVAL_RATE,
    TABLE_RATE,
    TABLE_SETTINGS,
    TrainSettings,
    parse_arguments,
)

if TYPE_CHECKING:
    from million_experts.studies.runs import Ledger

HELP = "Compare PEER with its competitors at equal cost: training runs, a ledger of them, a report."
DEFAULT_OUTPUT = Path("runs/studies")
DATA = ["wikipedia-leads", "state-of-the-union"]
METHODS = ("dense", "swiglu", "moe", "expert_choice", "pkm", "memory_plus", "peer", "peer_shared")

Output = Annotated[
    Path,
    typer.Option(
        help="Folder for the ledger, STUDY.jsonl, and the report. Runs in the ledger are not repeated."
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds, 0, 1, ..., of weights and order of the data.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the runs and the hours that they will take; train nothing.")
]
Data = Annotated[
    list[str],
    typer.Option(
        help="Corpus, as in `train`; repeat for several. `isoflop` tests on each one's test split by itself.",
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of the text in JSONL, Parquet and hub data.")]
MaxDocuments = Annotated[
    int | None, typer.Option(min=3, help="Use only the first so many documents of each text.")
]
CacheDir = Annotated[str, typer.Option(help="Folder of tokenised text.")]
VocabSize = Annotated[int, typer.Option(help="Tokens of the tokenizer, trained on the training splits.")]
ContextTokens = Annotated[int, typer.Option("--context", help="Tokens of a training sequence.")]
BatchSize = Annotated[int, typer.Option(help="Sequences in a micro-batch.")]
Accumulation = Annotated[int, typer.Option("--gradient-accumulation-steps", help="Micro-batches in a step.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16, as in `train`.")]
_RETRIEVAL_RATE = "Learning rate of query projections and sub-keys, in units of the others'."
TableBeta1 = Annotated[
    float, typer.Option(help="AdamW's decay of the first moment of tables; 0 is without momentum.")
]
TableSecondMoment = Annotated[
    str, typer.Option(help="AdamW's second moment of tables: a number for each element, or for each row.")
]


def _arguments(what: str) -> Any:
    text = f"Argument of {what} as name=value, in place of its default. Repeat for several."
    return typer.Option(help=text, rich_help_panel="Layers", show_default=False)


def isoflop(
    context: typer.Context,
    budget: Annotated[list[float], typer.Option(help="Training FLOPs of a run. Repeat for several.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Feed-forwards of the middle block, with commas between. A name after a colon, as in "
            "peer:k64, makes it a variant: its rows stand beside those of other layer arguments. By default "
            f"all: {', '.join(METHODS)}.",
            show_default=False,
        ),
    ] = ",".join(METHODS),
    seeds: Seeds = 3,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            help="Models as WIDTHxBLOCKS with commas between, e.g. 64x3,128x4: once for all budgets, or once "
            "for each, in their order. By default those whose dense form sees 5 to 60 tokens for each of its "
            "parameters.",
            show_default=False,
        ),
    ] = None,
    learning_rates: Annotated[
        str,
        typer.Option(help="Tried for every method at the smallest budget and its middle size, first seed."),
    ] = "2e-3,4e-3,8e-3",
    sweep_every_budget: Annotated[
        bool,
        typer.Option(
            "--sweep-every-budget",
            help="Try the learning rates at every budget: longer training may want another.",
        ),
    ] = False,
    table_rate: Annotated[
        float, typer.Option(help="Learning rate of tables of experts or values, in units of the others'.")
    ] = TABLE_RATE,
    retrieval_rate: Annotated[
        float | None,
        typer.Option(
            help=f"{_RETRIEVAL_RATE} By default {RETRIEVAL_RATE} for PEER, 1 for memories.",
            show_default=False,
        ),
    ] = None,
    table_beta1: TableBeta1 = 0.0,
    table_second_moment: TableSecondMoment = "row",
    all_sizes: Annotated[
        bool, typer.Option("--all-sizes", help="All seeds at every size, not only at each method's best.")
    ] = False,
    data: Data = DATA,
    text_column: TextColumn = "text",
    max_documents: MaxDocuments = None,
    vocab_size: VocabSize = 4096,
    context_tokens: ContextTokens = 256,
    batch_size: BatchSize = 16,
    gradient_accumulation_steps: Accumulation = 1,
    precision: Precision = "auto",
    peer: Annotated[list[str] | None, _arguments("PEER, with a shared branch or without,")] = None,
    peer_shared: Annotated[list[str] | None, _arguments("PEER with a shared branch alone")] = None,
    dense: Annotated[list[str] | None, _arguments("every dense layer")] = None,
    swiglu: Annotated[list[str] | None, _arguments("the dense layer with SwiGLU")] = None,
    moe: Annotated[list[str] | None, _arguments("the token-choice mixture")] = None,
    expert_choice: Annotated[list[str] | None, _arguments("the expert-choice mixture")] = None,
    pkm: Annotated[list[str] | None, _arguments("the product-key memory")] = None,
    memory_plus: Annotated[list[str] | None, _arguments("Memory+")] = None,
    output: Output = DEFAULT_OUTPUT,
    cache_dir: CacheDir = DEFAULT_CACHE,
    dry_run: DryRun = False,
) -> None:
    """Train models of several sizes at a fixed budget of FLOPs, with each kind of feed-forward.

    First a sweep of the learning rate for each method, then all sizes with the first seed, then the other
    seeds at the best size: choices by validation loss. Interrupt at will: the same command goes on.
    """
    from million_experts.studies.isoflop import Options, Size, by_budget, print_plan, run_study

    given = {
        "peer": peer,
        "peer_shared": peer_shared,
        "dense": dense,
        "swiglu": swiglu,
        "moe": moe,
        "expert_choice": expert_choice,
        "pkm": pkm,
        "memory_plus": memory_plus,
    }
    options = Options(
        budgets=tuple(budget),
        methods=tuple(_names(methods)),
        seeds=seeds,
        sizes=by_budget(budget, [tuple(map(Size.parse, _names(text))) for text in sizes or ()]),
        learning_rates=_numbers("learning_rates", learning_rates, float),
        arguments={name: layer_arguments(name, pairs) for name, pairs in given.items() if pairs},
        table_rate=table_rate,
        retrieval_rate=retrieval_rate,
        sweep_every_budget=sweep_every_budget,
        all_sizes=all_sizes,
        base=TrainSettings(
            data=list(data),
            text_column=text_column,
            max_documents=max_documents,
            vocab_size=vocab_size,
            context=context_tokens,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            precision=precision,
            cache_dir=cache_dir,
            table_adam_beta1=table_beta1,
            table_second_moment=table_second_moment,
        ),
    )
    ledger = open_ledger(output, "isoflop", dry_run)
    if dry_run:
        print_plan(options, ledger, Terminal())
        return
    run_study(options, ledger, Terminal(), command_line(context))
    finish(ledger, Terminal())


def ablation(
    context: typer.Context,
    axes: Annotated[
        str | None,
        typer.Option(
            help="What to vary, with commas between: num_experts, active, heads, query_norm, share_keys, "
            "score, glu, placement, table_rate, table_beta1, retrieval_rate, init_std, shared_width. "
            "By default all.",
            show_default=False,
        ),
    ] = None,
    pools: Annotated[
        str, typer.Option(help="Numbers of experts of the axes num_experts and query_norm.")
    ] = "16384,65536,262144,1048576",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps of every run, so all read the same text; by default 500.", show_default=False
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Training FLOPs of every run in place of --steps.", show_default=False),
    ] = None,
    seeds: Seeds = 3,
    usage_tokens: Annotated[
        int, typer.Option(min=1, help="Validation tokens over which expert usage is taken.")
    ] = 200_000,
    num_experts: Annotated[
        int | None, typer.Option(help="Experts of the base; by default 128^2.", show_default=False)
    ] = None,
    peer: Annotated[list[str] | None, _arguments("the base's PEER layer")] = None,
    dense: Annotated[list[str] | None, _arguments("the dense layers")] = None,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 256,
    num_hidden_layers: Annotated[int, typer.Option(help="Blocks of the model.")] = 4,
    num_attention_heads: Annotated[int, typer.Option(help="Heads of its attention.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, but for tables.")] = 2e-3,
    table_rate: Annotated[
        float, typer.Option(help="Learning rate of the base's table, in units of the others'.")
    ] = TABLE_RATE,
    retrieval_rate: Annotated[float, typer.Option(help=_RETRIEVAL_RATE)] = RETRIEVAL_RATE,
    table_beta1: TableBeta1 = 0.0,
    table_second_moment: TableSecondMoment = "row",
    data: Data = DATA,
    text_column: TextColumn = "text",
    max_documents: MaxDocuments = None,
    vocab_size: VocabSize = 4096,
    context_tokens: ContextTokens = 256,
    batch_size: BatchSize = 16,
    gradient_accumulation_steps: Accumulation = 1,
    precision: Precision = "auto",
    output: Output = DEFAULT_OUTPUT,
    cache_dir: CacheDir = DEFAULT_CACHE,
    dry_run: DryRun = False,
) -> None:
    """Change one choice of the PEER layer at a time, at a fixed number of tokens: the paper's ablations.

    The base is the paper's layer with fewer experts, in the middle block. A run that several axes ask for is
    trained once. Beside losses, rows hold the usage of experts as in the paper's Table 2, and under query
    BatchNorm what training mode gains from other tokens. Interrupt at will: the same command goes on.
    """
    from million_experts.studies.ablation import AXES, ablation_runs, usage_and_modes
    from million_experts.studies.runs import execute, print_runs

    _one_of({"--steps": steps, "--budget": budget})
    arguments = layer_arguments("peer", peer)
    _one_of({"--num-experts": num_experts, "--peer num_experts": arguments.get("num_experts")})
    base = TrainSettings(
        data=list(data),
        text_column=text_column,
        max_documents=max_documents,
        vocab_size=vocab_size,
        context=context_tokens,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        precision=precision,
        cache_dir=cache_dir,
        table_adam_beta1=table_beta1,
        table_second_moment=table_second_moment,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        steps=500 if steps is None else steps,
        learning_rate=learning_rate,
        table_learning_rate=table_rate * learning_rate,
        retrieval_learning_rate=retrieval_rate * learning_rate,
        peer={"num_experts": 128**2 if num_experts is None else num_experts, **arguments},
        dense=layer_arguments("dense", dense),
    )
    runs = ablation_runs(
        base,
        tuple(AXES) if axes is None else _names(axes),
        range(seeds),
        _numbers("pools", pools, int),
        budget,
    )
    ledger = open_ledger(output, "ablation", dry_run)
    if dry_run:
        print_runs(runs, ledger, Terminal())
        return
    execute(runs, ledger, Terminal(), usage_and_modes(usage_tokens), command_line(context))
    finish(ledger, Terminal())


def ostix360(
    context: typer.Context,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="The original: 20,000 articles of the simple Wikipedia from the hub, vocabulary 32,000, "
            "2,500 steps. Hours on a small machine.",
        ),
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Other arguments of the PEER layers as name=value, or how they learn "
            f"({', '.join(TABLE_SETTINGS)}): a variant of both tests, beside them in the report, with as "
            "many parameters. Repeat for several.",
            rich_help_panel="Layers",
            show_default=False,
        ),
    ] = None,
    tests: Annotated[
        str, typer.Option(help="Of the three tests, with commas between.")
    ] = "peer,peer_glu,moe",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps of every run; by default 1,000, with --full 2,500.", show_default=False
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Training FLOPs of the baseline in place of --steps: all tests take as many steps.",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of all tests, of the baseline, too: variants beside them in the report. "
            "By default the predecessor's, 0.0005.",
            show_default=False,
        ),
    ] = None,
    seeds: Seeds = 3,
    timed_steps: Annotated[
        int, typer.Option(min=3, help="Steps of each model that are timed after the training runs.")
    ] = 36,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Corpus, as in `train`; repeat for several. By default {' and '.join(DATA)}.",
            show_default=False,
        ),
    ] = None,
    max_documents: MaxDocuments = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the tokenizer; by default 4,096, with --full 32,000.", show_default=False
        ),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option("--context", help="Tokens of a training sequence; by default 512.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences of a step; by default 8.", show_default=False)
    ] = None,
    precision: Precision = "auto",
    output: Output = DEFAULT_OUTPUT,
    cache_dir: CacheDir = DEFAULT_CACHE,
    dry_run: DryRun = False,
) -> None:
    """Repeat the predecessor's three tests: PEER, PEER with GLU and Mixtral's mixture at equal parameters.

    Same shapes and schedule as there, by default with a smaller vocabulary, fewer tokens and text that needs
    no network. Loss, time of a step and peak memory; steps are timed after the training, the models in turns.
    """
    from million_experts.studies.ostix360 import choose_tests, name_variants, ostix360_runs, run_study
    from million_experts.studies.runs import print_runs

    _one_of({"--steps": steps, "--budget": budget})
    scaled = {"data": DATA, "max_documents": None, "vocab_size": 4096, "steps": 1000}
    given = {
        "data": data,
        "max_documents": max_documents,
        "vocab_size": vocab_size,
        "context": context_tokens,
        "batch_size": batch_size,
        "steps": steps,
        "precision": precision,
        "cache_dir": cache_dir,
    }
    changes = ({} if full else scaled) | {name: value for name, value in given.items() if value is not None}
    arguments = layer_arguments("peer", peer)
    selected = choose_tests(changes, arguments, _names(tests), budget, learning_rate)
    variants = name_variants(arguments, learning_rate)
    # The original reads other text, so its losses cannot stand beside the others.
    ledger = open_ledger(output, "ostix360-full" if full else "ostix360", dry_run)
    if dry_run:
        print_runs(ostix360_runs(selected, range(seeds), variants), ledger, Terminal())
        return
    run_study(selected, range(seeds), ledger, Terminal(), variants, command_line(context), timed_steps)
    finish(ledger, Terminal())


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the ledgers; the reports go there.")
    ] = DEFAULT_OUTPUT,
) -> None:
    """Write the reports of a folder's studies, each with its figures, from their ledgers."""
    from million_experts.studies.report import write_reports

    for path in write_reports(folder):
        Terminal().print(f"Report: {path}", markup=False, soft_wrap=True)


COMMANDS: dict[str, Callable[..., None]] = {
    "isoflop": isoflop,
    "ablation": ablation,
    "ostix360": ostix360,
    "report": report,
}


def open_ledger(output: Path, study: str, dry_run: bool = False) -> "Ledger":
    """The ledger of a study in the folder of `--output`, which is made, but for a dry run."""
    from million_experts.lm.files import make_folder
    from million_experts.studies.report import ledger_path
    from million_experts.studies.runs import Ledger

    if not dry_run:
        make_folder("output", output)
    return Ledger(ledger_path(output, study))


def finish(ledger: "Ledger", console: Console) -> None:
    """Writes the report of a study that has ended, and says where it is."""
    from million_experts.studies.report import write_report

    console.print(f"Report: {write_report(ledger)}", markup=False, soft_wrap=True)


def command_line(context: typer.Context) -> str:
    """The command that the user gave, from what was parsed, for the rows of the ledger."""
    words = ["million-experts", "study", context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        source, value = context.get_parameter_source(name), context.params.get(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        option = parameter.opts[-1]
        if isinstance(value, bool):
            words.append(option if value else parameter.secondary_opts[-1])
        else:
            for part in value if isinstance(value, list | tuple) else [value]:
                words += [option, _exact(part) if isinstance(part, float) else str(part)]
    return shlex.join(words)


def _exact(number: float) -> str:
    """The shortest text that gives the number again, "2e+13" for 20000000000000.0."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def layer_arguments(name: str, pairs: list[str] | None) -> dict[str, Any]:
    """The arguments that an option of a layer's name gives.

    Raises:
        ValueError: they are not of the form name=value.
    """
    try:
        return parse_arguments(pairs or [])
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} {error}") from error


def _one_of(options: dict[str, Any]) -> None:
    """Refuses options that were given together though each decides what the other would."""
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        got = (
            f"{name} {_exact(value) if isinstance(value, float) else value}" for name, value in given.items()
        )
        raise ValueError(f"{' and '.join(given)} exclude each other, got {' and '.join(got)}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


_Number = TypeVar("_Number", int, float)


def _numbers(name: str, text: str, kind: type[_Number]) -> tuple[_Number, ...]:
    try:
        return tuple(map(kind, text.split(",")))
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name} must be {what} with commas between, got {text!r}") from error
