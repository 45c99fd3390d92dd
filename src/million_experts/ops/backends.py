"""Which implementations of the operations run here, and why the others do not."""

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from million_experts._arguments import check_choice
from million_experts.ops import reference

NAMES = ("auto", "reference", "cpu", "triton")

# Types of device whose tensors a backend takes; the reference takes all. PyTorch calls AMD's GPUs cuda too.
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",)}

# What the kernels need. `triton.knobs` came with 3.4, which PyTorch 2.8 brings; they are tested with 3.7.1,
# and compile with 3.4, 3.5 and 3.6. NVIDIA's GPUs have bfloat16 and TF32 from Ampere, 8.0, on.
_OLDEST_TRITON = (3, 4)
_OLDEST_CAPABILITY = (8, 0)

_IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference}
_UNAVAILABLE: dict[str, str] = {}
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
# The package is imported when a kernel is first wanted: it takes a while, and most machines have no GPU.
if importlib.util.find_spec("triton") is None:
    _UNAVAILABLE["triton"] = "the package triton is not installed (it comes with PyTorch's builds for GPUs)"


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run here, or None where it can."""
    return {name: _obstacle(name) for name in NAMES[1:]}


def _obstacle(name: str) -> str | None:
    if name in _UNAVAILABLE or name != "triton":
        return _UNAVAILABLE.get(name)
    if not (interpreted() or torch.cuda.is_available()):
        return (
            "no GPU that CUDA or ROCm reaches; with TRITON_INTERPRET=1 in the environment the CPU interprets "
            "the kernels, very slowly"
        )
    return _old_triton() or (None if interpreted() else _unfit_gpu())


# Dynamo shall ask and not follow: package and GPU do not change. `torch.compiler.assume_constant_result` says
# the same, but would import the compiler with this module.
_obstacle.__dict__["_dynamo_marked_constant"] = True


def _old_triton() -> str | None:
    try:
        import triton  # it says its version itself: on ROCm it may be installed under another name
    except ImportError as error:
        return f"the package triton cannot be imported: {error}"
    major, minor = triton.__version__.split(".")[:2]
    if (int(major), int(minor)) >= _OLDEST_TRITON:
        return None
    least = ".".join(map(str, _OLDEST_TRITON))
    return f"the kernels need triton {least} or newer (PyTorch 2.8 brings it), got {triton.__version__}"


def _unfit_gpu() -> str | None:
    if torch.version.hip is not None:
        return None
    # The current device stands for all: tensors may lie on another, but nobody has said yet which.
    try:  # what asks first starts CUDA, which a forked process or the driver may refuse
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    except RuntimeError as error:
        return f"the GPU does not start: {error}"
    if (gpu.major, gpu.minor) >= _OLDEST_CAPABILITY:
        return None
    least = ".".join(map(str, _OLDEST_CAPABILITY))
    return (
        f"the kernels need a GPU of compute capability {least} or higher, the current device has "
        f"{gpu.major}.{gpu.minor} ({gpu.name})"
    )


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend: str, device: str = "cpu") -> str:
    """The name of the implementation that `backend` stands for, for tensors on a type of device.

    Raises:
        ValueError: `backend` is not one of `NAMES`.
        BackendError: `backend` was asked for by name and cannot run here, or not on this device.
    """
    check_choice("backend", backend, NAMES)
    if backend == "auto":
        fastest = "triton" if device == "cuda" else "cpu"
        if fastest == "triton" and interpreted():  # that is for whoever asks for it by name
            return "reference"
        return fastest if _obstacle(fastest) is None and _takes(fastest, device) else "reference"
    reason = _obstacle(backend)
    if reason is not None:
        others = ", ".join(name for name in ("triton", "cpu", "reference") if _obstacle(name) is None)
        raise BackendError(f"backend {backend!r} cannot run here: {reason}; backends that run here: {others}")
    if not _takes(backend, device):
        raise BackendError(f"backend {backend!r} does not take tensors on {device}; use 'auto'")
    return backend


def _takes(name: str, device: str) -> bool:
    # A meta tensor has no data: every backend only says which shape it would give.
    if name == "reference" or device in ("meta", *_DEVICES[name]):
        return True
    return name == "triton" and device == "cpu" and interpreted()


def implementation(backend: str) -> ModuleType:
    """The module behind a resolved backend name; it has the functions of `reference`.

    Raises:
        BackendError: the package triton that is installed does not fit.
    """
    if backend not in _IMPLEMENTATIONS:
        try:
            _IMPLEMENTATIONS[backend] = importlib.import_module(f"million_experts.ops.{backend}")
        except (ImportError, AttributeError) as error:
            raise BackendError(f"backend {backend!r} needs a newer package triton: {error}") from error
    return _IMPLEMENTATIONS[backend]


def advise_huge_pages(tensor: Tensor) -> bool:
    """Asks the system for huge pages under a large tensor, such as a table; whether it may grant them.

    Otherwise each row at a random place of gigabytes costs a walk through page tables. Best before the first
    write to the tensor.
    """
    cpu = _IMPLEMENTATIONS.get("cpu")
    return cpu is not None and cpu.advise_huge_pages(tensor)
