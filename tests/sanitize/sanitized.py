"""Puts the kernels at ME_KERNELS where million_experts.ops looks for its own; also a plugin of pytest."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  (its OpenMP runtime comes first)

NAME = "million_experts.ops._kernels"


def _load(path: str) -> None:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module


_load(os.environ["ME_KERNELS"])

from million_experts.ops import cpu  # noqa: E402

assert cpu._kernels.__file__ == os.environ["ME_KERNELS"]


def pytest_collection_modifyitems(items) -> None:
    # A sanitizer's own memory would be measured.
    items[:] = [item for item in items if "measure_peaks" not in item.fixturenames]
