"""Everything that `million-experts train` can be told, its documentation, and the presets."""

import dataclasses
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml

from million_experts._arguments import did_you_mean
from million_experts.lm.files import write_whole

SETTINGS_FILE = "settings.yaml"
# Times learning_rate, by default: what won, by probes that docs/decisions.md tells of.
TABLE_RATE, RETRIEVAL_RATE = 4, 0.25
DEFAULT_CACHE = "~/.cache/million-experts"
MOST_VALUES = 10_000  # of a YAML text
SECOND_MOMENTS = ("element", "row")  # those of RowwiseAdamW; torch shall not load for the help
PRECISIONS = ("auto", "float32", "bfloat16")
# Those of transformers that need no arguments of their own.
SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
# How tables learn, and what retrieves from them.
TABLE_SETTINGS = (
    "table_learning_rate",
    "table_weight_decay",
    "table_adam_beta1",
    "table_second_moment",
    "retrieval_learning_rate",
)
_PRESETS = files("million_experts.lm") / "presets"

# May differ between a run and its resumption: they say where things go and how often, not what is learnt.
FREE_ON_RESUME = frozenset(
    {"output_dir", "cache_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_to"}
)


def _option(default: Any, panel: str, help: str) -> Any:
    metadata = {"panel": panel, "help": help}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainSettings:
    """Settings of one training run; field by field the options of `million-experts train`.

    The fields' metadata hold their documentation. Names are those of transformers where it has one.
    """

    data: list[str] = _option(
        ["wikipedia-leads"],
        "Data",
        "Corpus: wikipedia-leads, state-of-the-union, a file, folder or glob of .txt (one document a file), "
        ".jsonl, .json (also as .gz) or .parquet, or hub:owner/name[:config]. Repeat for several.",
    )
    text_column: str = _option("text", "Data", "Column of the text in JSONL, Parquet and hub data.")
    max_documents: int | None = _option(None, "Data", "Use only the first so many documents of each corpus.")
    validation_share: float = _option(0.05, "Data", "Share of the documents held out for validation.")
    test_share: float = _option(0.05, "Data", "Share of the documents held out for the final test.")
    vocab_size: int = _option(4096, "Data", "Tokens of the byte-level BPE trained on the training split.")
    context: int = _option(256, "Data", "Tokens of a training sequence.")
    document_mask: bool = _option(
        True, "Data", "Keep attention and positions within a document; without it the text is one stream."
    )

    hidden_size: int = _option(256, "Model", "Width D of the residual stream.")
    num_hidden_layers: int = _option(4, "Model", "Blocks of attention and feed-forward.")
    num_attention_heads: int = _option(4, "Model", "Query heads of the attention.")
    num_key_value_heads: int | None = _option(None, "Model", "Key and value heads; as many as query heads.")
    mlp_layer_types: str | list[str] | None = _option(
        None,
        "Model",
        "Feed-forward of the blocks: one kind for all (dense, swiglu, peer, moe, expert_choice, pkm, "
        "memory_plus) or one for each, with commas. "
        "By default peer in the middle block and dense in the others, as in the paper.",
    )
    peer: dict[str, Any] = _option(
        {}, "Model", "Argument of the PEER layers as name=value, e.g. num_experts=262144. Repeat for several."
    )
    dense: dict[str, Any] = _option(
        {}, "Model", "Argument of the dense layers as name=value, e.g. width=1024. Repeat for several."
    )
    swiglu: dict[str, Any] = _option({}, "Model", "Argument of the dense layers with SwiGLU, e.g. width=704.")
    moe: dict[str, Any] = _option({}, "Model", "Argument of the token-choice mixtures, e.g. num_experts=8.")
    expert_choice: dict[str, Any] = _option({}, "Model", "Argument of the expert-choice mixtures.")
    pkm: dict[str, Any] = _option({}, "Model", "Argument of the product-key memories.")
    memory_plus: dict[str, Any] = _option({}, "Model", "Argument of the Memory+ layers.")
    tie_word_embeddings: bool = _option(True, "Model", "Let the output layer be the embedding table.")
    attention_dropout: float = _option(0.0, "Model", "Probability of dropping an attention weight.")

    steps: int = _option(1000, "Training", "Optimiser steps.")
    batch_size: int = _option(16, "Training", "Sequences in a micro-batch of one process.")
    gradient_accumulation_steps: int = _option(1, "Training", "Micro-batches in a step.")
    learning_rate: float = _option(2e-3, "Training", "Peak learning rate of everything but expert tables.")
    table_learning_rate: float | None = _option(
        None, "Training", f"Peak learning rate of the expert tables; by default {TABLE_RATE} x learning_rate."
    )
    retrieval_learning_rate: float | None = _option(
        None,
        "Training",
        f"Peak learning rate of query projections and sub-keys; by default {RETRIEVAL_RATE} x learning_rate.",
    )
    weight_decay: float = _option(0.1, "Training", "Weight decay of matrices other than expert tables.")
    table_weight_decay: float = _option(0.0, "Training", "Weight decay of the expert tables.")
    adam_beta1: float = _option(0.9, "Training", "AdamW's decay of the first moment.")
    adam_beta2: float = _option(0.95, "Training", "AdamW's decay of the second moment.")
    table_adam_beta1: float = _option(
        0.0,
        "Training",
        "That of the first moment of expert tables. With 0 none is kept for sparse gradients.",
    )
    table_second_moment: str = _option(
        "row",
        "Training",
        "AdamW's second moment of expert tables with sparse gradients: one for each element or each row.",
    )
    lr_scheduler_type: str = _option("cosine", "Training", f"One of {', '.join(SCHEDULES)}.")
    warmup_steps: float = _option(0.05, "Training", "Warm-up steps, or below 1 their share of all steps.")
    max_grad_norm: float = _option(1.0, "Training", "Clip the gradient's norm to this; 0 for no clipping.")
    precision: str = _option(
        "auto",
        "Training",
        "auto, float32 or bfloat16 (autocast: weights and sums stay float32). auto takes bfloat16 where the "
        "processor multiplies in it.",
    )
    sync_query_norm: bool = _option(
        True, "Training", "Under torchrun, take the statistics of query BatchNorm over all processes."
    )
    gradient_checkpointing: bool = _option(False, "Training", "Recompute activations to save memory.")
    torch_compile: bool = _option(False, "Training", "Compile the model; needs a C++ compiler.")
    seed: int = _option(0, "Training", "Seed of the split, the weights and the order of the data.")

    output_dir: str | None = _option(None, "Output", "Folder of the run; by default runs/PRESET.")
    cache_dir: str = _option(DEFAULT_CACHE, "Output", "Folder of tokenised text.")
    logging_steps: int = _option(10, "Output", "Steps between two logged losses.")
    eval_steps: int = _option(250, "Output", "Steps between two evaluations on the validation split.")
    save_steps: int = _option(250, "Output", "Steps between two checkpoints.")
    save_total_limit: int = _option(2, "Output", "Newest checkpoints to keep.")
    report_to: list[str] = _option(
        ["tensorboard"],
        "Output",
        "Where metrics go, as in transformers (none for nowhere). Repeat for several.",
    )
    prompt: str = _option("The", "Output", "Beginning of the sample that the trained model writes.")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = _coerce(getattr(self, f.name), FIELD_TYPES[f.name])
            if not _fits(value, FIELD_TYPES[f.name]):
                raise ValueError(f"{f.name} must be {describe_type(FIELD_TYPES[f.name])}, got {value!r}")
            setattr(self, f.name, value)
        for name in ("vocab_size", "context", "steps", "batch_size", "gradient_accumulation_steps"):
            _at_least(name, getattr(self, name), 2 if name == "context" else 1)
        for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit"):
            _at_least(name, getattr(self, name), 1)
        if self.max_documents is not None:
            _at_least("max_documents", self.max_documents, 3)
        for name in ("weight_decay", "table_weight_decay", "warmup_steps", "max_grad_norm", "seed"):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "table_learning_rate", "retrieval_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("validation_share", "test_share"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                "validation_share and test_share must leave text to train on, so be below 1 together, got "
                f"{self.validation_share} and {self.test_share}"
            )
        for name in ("attention_dropout", "adam_beta1", "adam_beta2", "table_adam_beta1"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        choices = {
            "precision": PRECISIONS,
            "lr_scheduler_type": SCHEDULES,
            "table_second_moment": SECOND_MOMENTS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.batch_size * self.context

    def tokens_per_step(self, processes: int = 1) -> int:
        """Tokens of all micro-batches of all processes."""
        return self.tokens_per_micro_batch * self.gradient_accumulation_steps * processes

    @property
    def peak_table_learning_rate(self) -> float:
        """The peak learning rate of the expert tables, where none is given too."""
        given = self.table_learning_rate
        return TABLE_RATE * self.learning_rate if given is None else given

    @property
    def peak_retrieval_learning_rate(self) -> float:
        """The peak learning rate of query projections and sub-keys, where none is given too."""
        given = self.retrieval_learning_rate
        return RETRIEVAL_RATE * self.learning_rate if given is None else given

    def save(self, path: Path) -> None:
        """Writes the settings as YAML, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> "TrainSettings":
        """Reads what `save` wrote, or any YAML file of settings."""
        return cls.from_dict(_read_yaml(path), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "TrainSettings":
        """Settings from a dict; `source` names it in errors.

        Raises:
            ValueError: a field that does not exist, or a value that does not fit.
        """
        for name in values:
            if name not in FIELD_TYPES:
                hint = did_you_mean(str(name), FIELD_TYPES)
                raise ValueError(f"{source} has an unknown setting {name!r}{hint}")
        return cls(**values)

    def with_overrides(self, overrides: dict[str, Any]) -> "TrainSettings":
        """The settings with some replaced; the dicts of feed-forward arguments are merged."""
        merged: dict[str, Any] = {
            name: {**getattr(self, name), **value} if isinstance(value, dict) else value
            for name, value in overrides.items()
        }
        return dataclasses.replace(self, **merged)

    def differences(self, other: "TrainSettings") -> list[str]:
        """Lines "name: this, not other" for what may not change when a run is resumed."""
        return [
            f"{f.name}: {getattr(self, f.name)!r}, not {getattr(other, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name not in FREE_ON_RESUME and getattr(self, f.name) != getattr(other, f.name)
        ]


FIELD_TYPES: dict[str, Any] = typing.get_type_hints(TrainSettings)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(Path(entry.name).stem for entry in _PRESETS.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> TrainSettings:
    """Settings of a preset that comes with the package, or of a YAML file.

    Raises:
        ValueError: neither a preset's name nor a file that exists; the presets are named.
    """
    if name in preset_names():
        settings = TrainSettings.from_dict(parse_yaml((_PRESETS / f"{name}.yaml").read_text()), name)
    elif Path(name).is_file():
        settings = TrainSettings.load(Path(name))
    else:
        raise ValueError(f"preset must be one of {', '.join(preset_names())} or a YAML file, got {name!r}")
    if settings.output_dir is None:
        settings.output_dir = str(Path("runs") / Path(name).stem)
    return settings


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's numbers: the older standard that PyYAML follows reads 1e-3 as text."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        _check_count(len(node.value))  # merge keys can double it with every line


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        yaml.YAMLError: the text is not YAML, or it stands for too much: with YAML's aliases a line can stand
            for a billion values.
    """
    try:
        value = yaml.load(text, Loader=_Yaml)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    rest, count = [value], 0
    while rest:
        part, count = rest.pop(), count + 1
        _check_count(count)
        if isinstance(part, dict | list | tuple | set):
            rest.extend(part.values() if isinstance(part, dict) else part)
    return value


def _check_count(count: int) -> None:
    if count > MOST_VALUES:
        raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values")


def parse_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Arguments of a layer from texts "name=value", each value in YAML.

    Raises:
        ValueError: a text of another form.
    """
    arguments = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"must be name=value, got {pair!r}")
        try:
            arguments[key.strip().replace("-", "_")] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{value!r} is not a value of YAML, such as 4, 0.1, true or [64, 32]") from error
    return arguments


def describe_type(kind: Any) -> str:
    """A type in words for an error message."""
    if isinstance(kind, UnionType):
        return " or ".join(describe_type(part) for part in typing.get_args(kind))
    return "none" if kind is NoneType else str(getattr(kind, "__name__", kind))


def _coerce(value: Any, kind: Any) -> Any:
    # YAML reads a whole number where a fraction is meant as an int.
    if float in (kind, *typing.get_args(kind)) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    if origin is list:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if origin in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, origin)


def _at_least(name: str, value: float, minimum: int) -> None:
    if not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():  # to read a pipe would take for ever
        raise ValueError(f"{path} must be a YAML file of settings")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # a date of month 13, say, is the latter
        raise ValueError(f"{path} is not a YAML file of settings: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings as name: value, got {type(values).__name__}")
    return values
