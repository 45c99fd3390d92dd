"""What runs on a GPU by `make test-gpu` and `make bench-gpu` runs here at tiny shapes, in the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from million_experts.benchmarks.gpu import plan, rows

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
def test_without_a_gpu_the_check_ends_with_a_reason(tmp_path):
    done = run("-m", "million_experts.benchmarks.gpu", "--output", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().startswith("bench-gpu: no GPU that CUDA or ROCm reaches")


def rehearse(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    done = run("-m", "million_experts.benchmarks.gpu", "--rehearse", "--output", str(folder), *arguments)
    return done, rows.read(folder)


def test_a_rehearsal_that_runs_out_of_time_ends_with_a_summary_and_is_resumed(tmp_path):
    arguments = ("--only", "right", "--minutes", "0.1")
    done, first = rehearse(tmp_path, *arguments)
    assert "Summary" in done.stdout
    assert "not reached, `--resume` goes on there: right " in done.stdout
    (machine,) = [row for row in first if row["part"] == "machine"]
    assert machine["gpu"] == "none: Triton's interpreter"  # also where there is one
    done, both = rehearse(tmp_path, *arguments, "--resume")
    ended = [row["case"] for row in both if row.get("event") == "end"]
    assert len(set(ended)) == len(ended)
    assert both[: len(first)] == first
    assert {row["status"] for row in rows.latest(both)} <= {"right"}


@pytest.mark.slow
def test_a_rehearsal_reaches_every_case(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All of it is rehearsed where there is no GPU. " * 300)
    done, found = rehearse(tmp_path / "run", "--minutes", "6", "--text", str(text))
    assert done.returncode == 0, done.stdout
    cases = {(case.part, case.name) for case in plan.make_plan(rehearsal=True, text=str(text))}
    assert {(row["part"], row["case"]) for row in found if row.get("event") == "end"} == cases
    assert {row["status"] for row in rows.latest(found)} == {"right", "timed", "done", "unavailable"}
    assert [row["fault"] for row in rows.latest(found) if row["status"] == "unavailable"] == [
        "ncu is not installed"
    ]
    page = run(
        "-m",
        "million_experts.benchmarks.gpu.report",
        str(tmp_path / "run"),
        "--output",
        str(tmp_path / "pages"),
    )
    assert page.returncode == 0, page.stderr
    assert "A rehearsal in the interpreter" in (tmp_path / "pages" / "results.md").read_text()


@pytest.mark.slow
def test_the_plan_s_kernels_compile_for_hopper(tmp_path):
    """Each once, though two processes compile them."""
    claims, commands = tmp_path / "claims", []
    claims.mkdir()
    for share in ("0/2", "1/2"):
        arguments = ["--share", share, "--claims", str(claims), "--capability", "90"]
        commands.append([sys.executable, "-m", "million_experts.benchmarks.gpu.compiling", *arguments])
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    processes = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    outputs = [process.communicate() for process in processes]
    assert [error for _, error in outputs] == ["", ""]
    counts = [int(said) for said, _ in outputs]
    assert min(counts) > 0
    assert sum(counts) == len(list(claims.iterdir())) > 300
