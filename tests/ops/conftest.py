"""Every implementation of the operations that runs here, as a fixture."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from million_experts.ops import available_backends

KERNELS = available_backends()["cpu"] is None


def _instruction_sets() -> list[str]:
    return importlib.import_module("million_experts.ops.cpu").instruction_sets() if KERNELS else []


@pytest.fixture(scope="module", params=["reference", *(f"cpu-{name}" for name in _instruction_sets())])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, once for each instruction set that this processor has.

    What takes long asks for fewer by `parametrize("backend", ["reference", "cpu"], indirect=True)`: "cpu" has
    the instruction set that is used by default.
    """
    name, _, instruction_set = request.param.partition("-")
    if name == "reference":
        yield name
        return
    with _instruction_set(_cpu(), instruction_set):
        yield name


@pytest.fixture(scope="module", params=_instruction_sets())
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """`million_experts.ops.cpu`, once for each instruction set that this processor has."""
    with _instruction_set(_cpu(), request.param) as cpu:
        yield cpu


@pytest.fixture
def cpu() -> ModuleType:
    """`million_experts.ops.cpu` with the instruction set that is used by default."""
    return _cpu()


def _cpu() -> ModuleType:
    if not KERNELS:
        pytest.skip(available_backends()["cpu"])
    return importlib.import_module("million_experts.ops.cpu")


@contextlib.contextmanager
def _instruction_set(cpu: ModuleType, name: str) -> Iterator[ModuleType]:
    default = cpu.instruction_set()
    if name:
        cpu.use_instruction_set(name)
    yield cpu
    cpu.use_instruction_set(default)
