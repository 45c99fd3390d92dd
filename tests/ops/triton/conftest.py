"""Kernels run in Triton's interpreter here: no GPU is needed.

The variable counts when Triton is imported, and with it kernels cannot be compiled: these tests have
a process of their own, as in `make test`.
"""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="run with TRITON_INTERPRET=1, as `make test` does"))
