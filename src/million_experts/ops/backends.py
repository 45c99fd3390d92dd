"""Which implementations of the operations run here, and why the others do not."""

from types import ModuleType

from million_experts._arguments import check_choice
from million_experts.ops import reference

NAMES = ("auto", "reference", "cpu", "triton")

# Fastest first: "auto" takes the first one that runs.
_IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference}
_UNAVAILABLE = {
    "cpu": "this release has no C++ kernels",
    "triton": "this release has no Triton kernels",
}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run here, or None where it can."""
    return {name: None if name in _IMPLEMENTATIONS else _UNAVAILABLE[name] for name in NAMES[1:]}


def resolve_backend(backend: str) -> str:
    """The name of the implementation that `backend` stands for.

    Raises:
        ValueError: `backend` is not one of `NAMES`.
        BackendError: `backend` was asked for by name and cannot run here.
    """
    check_choice("backend", backend, NAMES)
    if backend == "auto":
        return next(iter(_IMPLEMENTATIONS))
    if backend not in _IMPLEMENTATIONS:
        raise BackendError(
            f"backend {backend!r} cannot run here: {_UNAVAILABLE[backend]}; "
            f"backends that run here: {', '.join(_IMPLEMENTATIONS)}"
        )
    return backend


def implementation(backend: str) -> ModuleType:
    """The module behind a resolved backend name; it has the four functions of `reference`."""
    return _IMPLEMENTATIONS[backend]
