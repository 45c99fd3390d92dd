"""What these tests run on: a GPU, by `make test-gpu`.

With MILLION_EXPERTS_GPU_TESTS=interpreter they run at tiny shapes on the CPU, in Triton's interpreter: that
shows whether the tests themselves work. `tests/ops/triton/test_gpu_suite.py` does so.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETER = os.environ.get("MILLION_EXPERTS_GPU_TESTS") == "interpreter"
if INTERPRETER:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


def _obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if INTERPRETER:
        return None
    if not torch.cuda.is_available():
        return "no GPU that CUDA or ROCm reaches"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set: on a GPU, run `make test-gpu`"
    return None


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
