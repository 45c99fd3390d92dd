"""Every kernel, as it is launched, compiled for GPUs that are not there.

None spills, exceeds its target or adds to memory atomically.

`compile_kernels.py` compiles and reads the binaries; `launches.py` lists what is launched. A part of it is
compiled by `make test`, all by `make test-slow`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
MODULES = (
    "triton_experts",
    "triton_expert_rows",
    "triton_expert_tiles",
    "triton_retrieval",
    "triton_rowwise",
)
# Threads of a warp; registers of a thread and of all threads that share them; bytes of shared memory a block.
LIMITS = {
    "sm_80": (32, 255, 65536, 163 * 1024),
    "sm_90": (32, 255, 65536, 227 * 1024),
    "sm_100": (32, 255, 65536, 227 * 1024),
    "gfx942": (64, 512, None, 64 * 1024),
}


def compile_for(target: str, *options: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), target, *options],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(results: Iterable[dict[str, Any]]) -> None:
    for result in results:
        threads_of_a_warp, of_a_thread, of_a_block, shared = LIMITS[result["target"]]
        assert result["spills"] == 0, result
        assert result["local_bytes"] == 0, result
        assert 0 < result["registers"] <= of_a_thread, result
        # Registers are given to a warp in steps of 8 a thread.
        registers = -(-result["registers"] // 8) * 8 * result["warps"] * threads_of_a_warp
        assert of_a_block is None or registers <= of_a_block, result
        assert result["shared_bytes"] <= shared, result
        assert result["atomics"] == 0, result  # every sum has one order


def check_gathers(results: Iterable[dict[str, Any]]) -> None:
    """Rows whose width is a multiple of 16 are gathered 16 bytes a lane."""
    widths = [
        (int(width[1]), result["wide_loads"])
        for result in results
        if result["kernel"] == "dots_kernel" and (width := re.search(r"D=(\d+)", result["case"]))
    ]
    assert any(width % 16 == 0 for width, _ in widths)
    assert all(wide_loads > 0 for width, wide_loads in widths if width % 16 == 0), widths


def all_kernels() -> set[str]:
    """Names of the functions that are launched; the others are parts of them."""
    names = set()
    for module in MODULES:
        source = importlib.import_module(f"million_experts.ops.{module}")
        names |= {name for name in vars(source) if name.endswith("_kernel")}
    return names


def test_usual_launches_fit():
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(lambda target: compile_for(target, "--quick"), LIMITS):
            check(results)
            assert {result["kernel"] for result in results} == all_kernels()
            check_gathers(results)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", LIMITS)
def test_every_launch_fits(target):
    results = compile_for(target)
    check(results)
    check_gathers(results)
    assert {result["kernel"] for result in results} == all_kernels()
