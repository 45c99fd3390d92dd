"""`million-experts train`. Light to import, so that the command line's help stays quick."""

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any

import typer

from million_experts._terminal import Terminal
from million_experts.lm.settings import (
    DEFAULT_CACHE,
    FIELD_TYPES,
    SETTINGS_FILE,
    TrainSettings,
    load_preset,
    parse_arguments,
    preset_names,
)


def _train(preset: str | None, resume: bool, **options: Any) -> None:
    """Train a language model on real text, from a preset and options; end with figures and a sample.

    Presets: PRESETS; [bold]million-experts info PRESET[/bold] shows what is in one. Every setting can be
    replaced by its option; [bold]none[/bold] empties those that may be empty.

    [bold]million-experts train[/bold] trains the demo; [bold]--mlp-layer-types dense[/bold] trains the same
    model without experts.
    """
    overrides = {name: value for name, value in options.items() if value not in (None, [])}
    for name, value in overrides.items():
        allowed = typing.get_args(FIELD_TYPES[name])
        if type(None) in allowed and value == "none":
            overrides[name] = None
        elif type(None) in allowed and str not in allowed:
            overrides[name] = _number(value)
    for name, kind in FIELD_TYPES.items():
        if name in overrides and typing.get_origin(kind) is dict:
            overrides[name] = _parse_arguments(name, overrides[name])
    if kinds := overrides.get("mlp_layer_types"):
        overrides["mlp_layer_types"] = [k.strip() for k in kinds.split(",")] if "," in kinds else kinds
    from million_experts.lm.training import train

    console = Terminal()
    run = overrides.get("output_dir")
    stored = Path(run or "") / SETTINGS_FILE
    if resume and run and preset is None and stored.exists():
        settings = TrainSettings.load(stored)
        if "cache_dir" not in overrides and settings.cache_dir != DEFAULT_CACHE:
            # Whoever wrote the settings may be a stranger: they do not say where this user's files go.
            place = f"tokens go to {DEFAULT_CACHE}; --cache-dir {settings.cache_dir} for where they were"
            console.print(place, markup=False, soft_wrap=True)
            settings.cache_dir = DEFAULT_CACHE
    else:
        if resume and run and not stored.exists():
            console.print(f"nothing to resume in {run}: starting", markup=False, soft_wrap=True)
        settings = load_preset(preset or "demo")
    train(settings.with_overrides(overrides), resume=resume, console=console)


def train_command() -> Callable[..., None]:
    """`_train` with an option for every field of `TrainSettings`, documented by the field."""
    signature = {
        "preset": Annotated[
            str | None,
            typer.Option(
                help=f"One of {', '.join(preset_names())}, or a YAML file of settings; demo by default."
            ),
        ],
        "resume": Annotated[
            bool,
            typer.Option(
                "--resume",
                help="Go on from the newest checkpoint in --output-dir; start there if there is none.",
            ),
        ],
    }
    defaults: dict[str, Any] = {"preset": None, "resume": False}
    for name, field in TrainSettings.__dataclass_fields__.items():
        kind = _option_type(FIELD_TYPES[name])
        option = typer.Option(
            help=field.metadata["help"], rich_help_panel=field.metadata["panel"], show_default=False
        )
        signature[name] = Annotated[kind | None, option]
        defaults[name] = None

    def command(**options: Any) -> None:
        _train(**options)

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation
            )
            for name, annotation in signature.items()
        ]
    )
    command.__annotations__ = signature
    command.__doc__ = (_train.__doc__ or "").replace("PRESETS", ", ".join(preset_names()))
    return command


def _option_type(kind: Any) -> Any:
    """What the command line reads for a field: a list or dict is a repeated option, None is "none"."""
    if typing.get_origin(kind) in (list, dict):
        return list[str]
    return str if isinstance(kind, UnionType) else kind


def _number(text: str) -> Any:
    """The number that a text spells, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _parse_arguments(name: str, pairs: list[str]) -> dict[str, Any]:
    try:
        return parse_arguments(pairs)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name}") from error
