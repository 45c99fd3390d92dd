"""Which implementations of the operations run here, and why the others do not."""

import importlib
import importlib.util
from types import ModuleType

from torch import Tensor

from million_experts._arguments import check_choice
from million_experts.ops import reference

NAMES = ("auto", "reference", "cpu", "triton")

# Fastest first: "auto" takes the first one that runs.
_IMPLEMENTATIONS: dict[str, ModuleType] = {}
_UNAVAILABLE = {"triton": "this release has no Triton kernels"}
if importlib.util.find_spec("million_experts.ops._kernels") is None:
    # pip keeps what it built: without --no-cache-dir a compiler that came later would change nothing.
    _UNAVAILABLE["cpu"] = (
        "this installation has no C++ kernels: no C++17 compiler worked when it was built; install a wheel "
        "that has them, or build it again (pip install -v --force-reinstall --no-deps --no-cache-dir)"
    )
else:
    try:
        _IMPLEMENTATIONS["cpu"] = importlib.import_module("million_experts.ops.cpu")
    except ImportError as error:
        _UNAVAILABLE["cpu"] = f"the C++ kernels cannot be loaded here: {error}"
_IMPLEMENTATIONS["reference"] = reference


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run here, or None where it can."""
    return {name: None if name in _IMPLEMENTATIONS else _UNAVAILABLE[name] for name in NAMES[1:]}


def resolve_backend(backend: str, device: str = "cpu") -> str:
    """The name of the implementation that `backend` stands for, for tensors on a type of device.

    Raises:
        ValueError: `backend` is not one of `NAMES`.
        BackendError: `backend` was asked for by name and cannot run here, or not on this device.
    """
    check_choice("backend", backend, NAMES)
    if backend == "auto":
        return next(name for name, module in _IMPLEMENTATIONS.items() if _takes(module, device))
    if backend not in _IMPLEMENTATIONS:
        raise BackendError(
            f"backend {backend!r} cannot run here: {_UNAVAILABLE[backend]}; "
            f"backends that run here: {', '.join(_IMPLEMENTATIONS)}"
        )
    if not _takes(_IMPLEMENTATIONS[backend], device):
        raise BackendError(f"backend {backend!r} does not take tensors on {device}; use 'auto'")
    return backend


def _takes(module: ModuleType, device: str) -> bool:
    # A meta tensor has no data: every backend only says which shape it would give.
    return device in ("meta", *module.DEVICES) or not module.DEVICES


def implementation(backend: str) -> ModuleType:
    """The module behind a resolved backend name; it has the functions of `reference`."""
    return _IMPLEMENTATIONS[backend]


def advise_huge_pages(tensor: Tensor) -> bool:
    """Asks the system for huge pages under a large tensor, such as a table; whether it may grant them.

    Otherwise each row at a random place of gigabytes costs a walk through page tables. Best before the first
    write to the tensor.
    """
    cpu = _IMPLEMENTATIONS.get("cpu")
    return cpu is not None and cpu.advise_huge_pages(tensor)
