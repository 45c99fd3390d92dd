"""Draws cases of a boundary by hypothesis and has a worker try them until the time is up."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given

from fuzz.worker import receive, send

TESTS = Path(__file__).parent.parent
BATCH = 50  # cases per seed: a failure is found again by its seed
PATIENCE = 60  # seconds that a case may take on a busy machine


class Worker:
    """A process that tries one case after the other, and a new one where it died."""

    def __init__(self, boundary: str):
        self.boundary = boundary
        self.process: subprocess.Popen[bytes] | None = None

    def attempt(self, case: Any) -> tuple[str, str]:
        """What became of a case: "passed", "refused", "failed", "died" or "hung", and why."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            send(process.stdin, case)
            answered = select.select([process.stdout], [], [], PATIENCE)[0]
            if answered:
                return receive(process.stdout)
        except (EOFError, BrokenPipeError):
            process.wait()
            self.process = None
            code = process.returncode
            reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return "died", f"{reason}\n{self._errors()}"
        self.close()
        return "hung", f"no answer in {PATIENCE} s"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _errors(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace")[-2000:]

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
            path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", self.boundary],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
            )
            assert self.process.stdout is not None
            try:
                receive(self.process.stdout)  # it is ready: imports are no part of the patience
            except EOFError:
                raise RuntimeError(
                    f"the worker of {self.boundary} did not start:\n{self._errors()}"
                ) from None
        return self.process


def fuzz(boundary: str, seconds: float) -> Counter[str]:
    """Tries cases for so many seconds; returns how many passed and were refused.

    Raises:
        AssertionError: a case failed, or ended or hung its process. Hypothesis makes it small first.
    """
    cases = importlib.import_module(f"fuzz.{boundary}").cases
    counts: Counter[str] = Counter()
    with contextlib.closing(Worker(boundary)) as worker:

        @given(cases)
        def attempt(case: Any) -> None:
            result, why = worker.attempt(case)
            counts[result] += 1
            assert result in ("passed", "refused"), f"{boundary} {result}: {case}\n{why}"

        attempt = hypothesis.settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            derandomize=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(attempt)
        end, batch = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            hypothesis.seed(batch)(attempt)()
            batch += 1
    return counts
