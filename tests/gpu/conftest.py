"""What these tests run on: a GPU, by `make test-gpu`.

With MILLION_EXPERTS_GPU_TESTS=interpreter they run at tiny shapes on the CPU, in Triton's interpreter: that
shows whether the tests themselves work. `tests/ops/triton/test_gpu_suite.py` does so.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from million_experts.ops import available_backends

INTERPRETER = os.environ.get("MILLION_EXPERTS_GPU_TESTS") == "interpreter"
if INTERPRETER:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


def _obstacle() -> str | None:
    if not INTERPRETER and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set: on a GPU, run `make test-gpu`"
    return available_backends()["triton"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _obstacle()
    for item in items:
        if reason is not None and item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETER else "cuda")


@pytest.fixture(scope="session")
def tiny() -> bool:
    """Whether shapes have to be tiny, for the interpreter."""
    if INTERPRETER:
        import sys
        from pathlib import Path

        sys.path.insert(0, str(Path(__file__).parents[1] / "ops/triton"))
        import triton_interpreter

        triton_interpreter.repair()
    return INTERPRETER


@pytest.fixture
def needs_bytes(tiny) -> Callable[[float], None]:
    """Skips a test for which the GPU has not so many bytes left."""

    def check(count: float) -> None:
        if tiny:
            return
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < count:
            pytest.skip(f"needs {count / 2**30:.0f} GiB of the GPU's memory")

    return check
