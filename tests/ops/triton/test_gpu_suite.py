"""What runs on a GPU by `make test-gpu` and `make bench-gpu` runs here at tiny shapes, in the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[3]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MILLION_EXPERTS_GPU_TESTS")
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_tests_pass_at_tiny_shapes():
    done = run("-m", "pytest", "-p", "no:cacheprovider", "tests/gpu", MILLION_EXPERTS_GPU_TESTS="interpreter")
    assert done.returncode == 0, done.stdout
    skipped = re.search(r"(\d+) skipped", done.stdout)
    assert skipped is not None
    assert skipped[1] == "1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_they_are_skipped_with_a_reason():
    done = run("-m", "pytest", "-p", "no:cacheprovider", "-rs", "tests/gpu")
    assert done.returncode == 0, done.stdout
    assert "no GPU that CUDA or ROCm reaches" in done.stdout
    assert " passed" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_benchmark_ends_with_a_reason():
    done = run("-m", "million_experts.benchmarks.gpu")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("bench-gpu: no GPU that CUDA or ROCm reaches")


def test_in_the_interpreter_the_benchmark_takes_tiny_shapes_alone():
    done = run("-m", "million_experts.benchmarks.gpu", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "interpreter is too slow for these shapes: --tiny, or without TRITON_INTERPRET" in done.stderr


def test_the_benchmark_ends_in_a_json_block():
    script = (
        "import sys, triton_interpreter; triton_interpreter.repair(); "
        "from million_experts.benchmarks import gpu; sys.exit(gpu.main())"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = run("-c", script, "--tiny", TRITON_INTERPRET="1", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    block = done.stdout.rpartition("```json\n")[2].partition("\n```")[0]
    result = json.loads(block)
    assert {"gpu", "versions", "commit", "bandwidth_bytes_per_second", "rows"} <= set(result)
    assert result["gpu"] == {"name": "none: Triton's interpreter"}  # also where there is one
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert row["status"] == "timed"
        assert row["seconds"]["median"] > 0
        assert row["error"] <= 2e-5
        assert row["necessary_bytes"] > 0
        assert row["share_of_roofline"] > 0
