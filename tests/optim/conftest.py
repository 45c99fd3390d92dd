"""Every implementation of the rows' update that runs here, as a fixture."""

from __future__ import annotations

import importlib

import pytest

from million_experts.ops import available_backends

KERNELS = available_backends()["cpu"] is None


def _instruction_sets() -> list[str]:
    return importlib.import_module("million_experts.ops.cpu").instruction_sets() if KERNELS else []


@pytest.fixture(scope="module", params=["reference", *_instruction_sets()])
def everywhere(request: pytest.FixtureRequest):
    """Makes "auto" the plain version, then the kernels of each instruction set that this processor has."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr("million_experts.optim.rowwise.resolve_backend", lambda *_: "reference")
            yield request.param
            return
        cpu = importlib.import_module("million_experts.ops.cpu")
        default = cpu.instruction_set()
        cpu.use_instruction_set(request.param)
        yield request.param
        cpu.use_instruction_set(default)
