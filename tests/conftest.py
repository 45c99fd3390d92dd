"""What all tests share: how exact a result must be, awkward memory layouts, peak memory of a section."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# The largest error allowed, relative to the largest value of the tensor. A bfloat16 result is computed in
# float32 and rounded once, to 8 significant bits; a float16 one to 11, half of the last of which is lost.
RELATIVE_ERROR = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-8 + 1e-5,
    torch.float16: 2**-11 + 1e-5,
}

# The same examples on every run, so that a failure can be repeated.
settings.register_profile("repeatable", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("repeatable")

# Tensors are tiny: on a busy machine a second thread makes the tests three times slower, never faster.
torch.set_num_threads(1)

# Some tests compare bits over numbers of threads. Ours do not depend on it; on some processors those of MKL's
# matrix products, such as the query projection's, do, unless it is told otherwise before its first one.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

Compare = Callable[..., None]


@pytest.fixture(scope="session")
def assert_close() -> Compare:
    """Compares a tensor with a finite expected one, at the precision of `dtype` (by default its own)."""

    def compare(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
        assert actual.shape == expected.shape
        assert torch.isfinite(expected).all()
        actual, allowed = actual.detach(), RELATIVE_ERROR[dtype or actual.dtype]
        if expected.numel() == 0:
            return
        expected = expected.detach().to(torch.float64)
        scale = expected.abs().max()
        error = (actual.to(torch.float64) - expected).abs().max()
        assert error <= allowed * scale, f"error {error:.3g} of {scale:.3g}, allowed {allowed:.3g} of it"

    return compare


@pytest.fixture(scope="session")
def spread_out() -> Callable[[Tensor], Tensor]:
    """Copies a tensor so that its last dimension has stride 2 and whoever reads the gaps is found out."""

    def copy(tensor: Tensor) -> Tensor:
        poison = float("nan") if tensor.is_floating_point() else -(2**40)
        return torch.stack([tensor, torch.full_like(tensor, poison)], -1)[..., 0]

    return copy


_MEASURE = """
import ctypes, gc, json, re
import torch

def _status(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def peak(run):
    '''Bytes by which the resident memory rises at most while `run()` works, its result included.'''
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = _status("VmRSS")
    result = run()
    return _status("VmHWM") - before
"""


@pytest.fixture(scope="session")
def measure_peaks() -> Callable[[str], dict[str, int]]:
    """Runs a script in a fresh process; it calls `peak(function)` and leaves a dict named `peaks`."""
    if not (Path("/proc/self/clear_refs").exists() and sys.platform == "linux"):
        pytest.skip("needs Linux's /proc/self/clear_refs")

    def measure(script: str) -> dict[str, int]:
        code = _MEASURE + textwrap.dedent(script) + "\nprint(json.dumps(peaks))"
        # Large blocks go back to the system at once, so that no section lives on an earlier one's memory.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return measure
