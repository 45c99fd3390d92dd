"""Whether a folder's weights can be read and are those of a model, found out before any of them is loaded.

transformers says of a damaged file what its reader stumbled over, without the file's name, and draws at
random what a file lacks: right for a new output layer, wrong for a model that is to be measured.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

__all__ = ["check_finite", "check_fits", "check_shapes", "read_json_object", "refuse_names"]

NAMED = 5  # an error names at most so many tensors


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        ValueError: it cannot be read, is no JSON, or no object; the message names the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, as transformers chooses them.

    Raises:
        ValueError: there are none, or the index that lists them is damaged or names one that is not there.
    """
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _indexed(folder / index)
    raise ValueError(
        f"{folder} has no weights that can be read: no {SAFE_WEIGHTS_NAME} and no {WEIGHTS_NAME}"
    )


def _indexed(index: Path) -> list[Path]:
    content = read_json_object(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} must map each tensor to a file in weight_map")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index} must hold an object named metadata")
    names = sorted(set(places.values()))
    if foreign := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} must name files of its own folder, got {foreign[0]!r}")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index.parent} lacks {absent[0]}, which {index.name} names")
    return [index.parent / name for name in names]


def stored_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """What the files hold: tensors on the meta device, of the stored names, shapes and dtypes.

    Raises:
        ValueError: a file cannot be read; the message names it.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        with named(path):
            tensors |= _pickled(path) if path.suffix == ".bin" else dict(_headers(path))
    return tensors


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Names the file in what its reader raises."""
    try:
        yield
    except (
        SafetensorError,
        OSError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        TypeError,
        KeyError,
    ) as error:
        reason = str(error).partition("\n")[0].partition(" In PyTorch")[0]
        raise ValueError(f"{path} is damaged: its weights cannot be read ({reason})") from error


def _headers(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensor = file.get_slice(name)
            dtype = tensor[()].dtype if not tensor.get_shape() else tensor[:0].dtype
            yield name, torch.empty(tensor.get_shape(), dtype=dtype, device="meta")


def _pickled(path: Path) -> dict[str, Tensor]:
    # `weights_only` builds tensors and refuses everything else, so that a file cannot run code.
    content = torch.load(path, map_location="meta", weights_only=True)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise TypeError("it holds something else than tensors")
    return dict(content)


def check_fits(folder: Path, model: Any) -> None:
    """Raise ValueError unless a folder's weights are all that a model of ours needs, and no others.

    Args:
        model: of the folder's configuration; it may be on the meta device.
    """
    stored, expected = _stored_for(model, folder), _expected(model)
    missing = [name for name in expected if not any(twin in stored for twin in _twins(model, name))]
    refuse_names(missing, f"{folder} lacks", "which config.json asks for")
    refuse_names(stored.keys() - expected.keys(), f"{folder} holds", "which config.json leaves no place for")
    _refuse_shapes(folder, stored, expected)
    kinds = [
        f"{name} {tensor.dtype} instead of {expected[name].dtype}"
        for name, tensor in stored.items()
        if tensor.is_floating_point() != expected[name].is_floating_point()
    ]
    refuse_names(kinds, f"{folder} has weights of another kind than the model:")


def check_shapes(folder: Path, model: Any) -> None:
    """Raise ValueError if weights that a model would take from a folder have other shapes than its own, or if
    they cannot be read."""
    _refuse_shapes(folder, _stored_for(model, folder), _expected(model))


def _refuse_shapes(folder: Path, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in stored.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    refuse_names(wrong, f"{folder} has weights of other shapes than config.json says:")


def _stored_for(model: Any, folder: Path) -> dict[str, Tensor]:
    """The stored tensors by the names that a model has for them: one of both may lack the output layer."""
    stored, expected = stored_tensors(weight_files(folder)), _expected(model)
    prefix = f"{model.base_model_prefix}."
    changes = [lambda name: name, lambda name: prefix + name, lambda name: name.removeprefix(prefix)]
    best = max(changes, key=lambda change: sum(change(name) in expected for name in stored))
    return {best(name): tensor for name, tensor in stored.items()}


def _expected(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))


def _twins(model: Any, name: str) -> set[str]:
    """The names under which a tensor may be stored: its own, and those of what it is tied to."""
    tied = model.all_tied_weights_keys
    source = tied.get(name, name)
    return {source, *(twin for twin, its_source in tied.items() if its_source == source)}


def check_finite(model: nn.Module) -> None:
    """Raise ValueError that names the tensors of a loaded model that hold NaN or infinity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    wrong = [name for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor)]
    refuse_names(wrong, "they hold NaN or infinity in")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    try:
        low, high = tensor.detach().aminmax()  # which are NaN where one value is; no second table in memory
    except (RuntimeError, NotImplementedError):  # the narrow kinds of floats have no order
        low = high = tensor.detach().float().sum()
    return bool(low.isfinite() & high.isfinite())


def refuse_names(names: Iterable[str], before: str, after: str = "") -> None:
    """Raise ValueError with the first of some names, if there are any, between two parts of a sentence."""
    if not (names := sorted(names)):
        return
    listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    raise ValueError(f"{before} {listed}{after and ', ' + after}")
