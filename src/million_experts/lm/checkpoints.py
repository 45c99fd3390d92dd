"""A run's checkpoints: which there are, and whether one is whole and the model's own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# What a configuration says beside what the model computes: how it was stored, and what it runs on or returns.
_NO_MEANING = {
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "output_routing",
    "peer.backend",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the message says why and what to do."""


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first."""
    found = []
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and step.isascii() and step.isdigit():
            found.append((int(step), folder))
    return sorted(found)


def check_checkpoint(folder: Path, model: PreTrainedModel, processes: int = 1) -> None:
    """Makes sure that a checkpoint can be read and fits the model, before anything is loaded from it.

    Args:
        processes: that train together; a checkpoint of another number has another order of the data.

    Raises:
        CheckpointError: a file is missing or damaged, or the configuration or the tensors are another
            model's; the newest checkpoint that is whole is named.
    """
    wrote = len(list(folder.glob("rng_state_*.pth"))) or 1
    if wrote != processes:
        raise CheckpointError(
            f"checkpoint {folder} was written by {wrote} processes and cannot go on in {processes}: use "
            + (f"torchrun --nproc-per-node {wrote}" if wrote > 1 else "one process")
        )
    fault = _fault(folder, model)
    if fault is None:
        return
    others = [other for _, other in list_checkpoints(folder.parent) if other != folder]
    whole = next((other for other in reversed(others) if _fault(other, model) is None), None)
    raise CheckpointError(
        f"checkpoint {folder} {fault}; "
        + (
            f"remove it to go on from {whole}"
            if whole is not None
            else "there is no whole one in the run: start again with another --output-dir"
        )
    )


def _fault(folder: Path, model: PreTrainedModel) -> str | None:
    """What keeps a checkpoint from being resumed, or None."""
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return "is not whole: it has no model.safetensors"
    except SafetensorError as error:
        return f"is damaged: model.safetensors cannot be read ({error})"
    needed = ["optimizer.pt", "scheduler.pt"]
    for name in needed + sorted(path.name for path in folder.glob("rng_state*.pth")):
        if not (folder / name).is_file():
            return f"is not whole: it has no {name}"
        try:
            with safe_globals():
                torch.load(folder / name, map_location="meta", weights_only=True, mmap=True)
        except Exception as error:
            return f"is damaged: {name} cannot be read ({str(error).splitlines()[0]})"
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except FileNotFoundError:
        return "is not whole: it has no trainer_state.json"
    except ValueError as error:
        return f"is damaged: trainer_state.json cannot be read ({error})"
    try:
        # A file leaves out what is the default: only a configuration says everything.
        config = type(model.config).from_dict(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        return "is not whole: it has no config.json"
    except Exception as error:
        return f"is damaged: config.json cannot be read ({str(error).splitlines()[0]})"
    return _other_meaning(config, model.config) or _misfit(stored, model)


def _other_meaning(stored: PreTrainedConfig, own: PreTrainedConfig) -> str | None:
    """The first setting by which two configurations describe different models, or None.

    Two models may hold the same tensors and compute different things with them.
    """
    theirs, ours = _meaning(stored), _meaning(own)
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            return (
                f"belongs to another configuration: {name} is {theirs.get(name)!r}, the model has "
                f"{ours.get(name)!r}"
            )
    return None


def _meaning(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings that decide what a model computes, as JSON holds them; those of a dict as `peer.score`."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(config.to_dict())).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if name not in _NO_MEANING}


def _misfit(stored: dict[str, tuple[int, ...]], model: PreTrainedModel) -> str | None:
    """The first tensor that a checkpoint and a model do not share, or None. Tied tensors are stored once."""
    tensors = model.state_dict(keep_vars=True)
    present = {id(tensors[name]) for name in stored if name in tensors}
    for name, shape in stored.items():
        if name not in tensors:
            return f"belongs to another configuration: it holds {name}, which the model has not"
        if tuple(tensors[name].shape) != shape:
            return (
                f"belongs to another configuration: it holds {name} of shape {list(shape)}, the model needs "
                f"{list(tensors[name].shape)}"
            )
    for name, tensor in tensors.items():
        if id(tensor) not in present:
            return f"belongs to another configuration: it has no {name}"
    return None
