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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given

from fuzz.worker import receive, send

TESTS = Path(__file__).parent.parent
BATCH = 25  # cases per seed: a failure is found again by its seed
PATIENCE = 60  # seconds that a case may take on a busy machine


class Worker:
    """A process that tries one case after the other, and a new one where it died."""

    def __init__(self, boundary: str):
        self.boundary = boundary
        self.process: subprocess.Popen[bytes] | None = None
        self.scratch = tempfile.TemporaryDirectory()  # for the files of processes, dead ones too

    def attempt(self, case: Any) -> tuple[str, str]:
        """What became of a case: "passed", "refused", "failed", "died" or "hung", and why."""
        process = self.start()
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
        self._end()
        return "hung", f"no answer in {PATIENCE} s"

    def close(self) -> None:
        self._end()
        self.scratch.cleanup()

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _errors(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace")[-2000:]

    def start(self) -> subprocess.Popen[bytes]:
        """Its process, once that has imported what it needs."""
        if self.process is None:
            self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
            path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", self.boundary],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                env=os.environ
                | {
                    "PYTHONPATH": path,
                    "OMP_NUM_THREADS": "2",
                    "HF_HUB_OFFLINE": "1",
                    "HF_DATASETS_CACHE": os.path.join(self.scratch.name, "datasets"),
                    "TMPDIR": self.scratch.name,
                },
            )
            assert self.process.stdout is not None
            try:
                receive(self.process.stdout)  # it is ready: imports are no part of the patience
            except EOFError:
                raise RuntimeError(
                    f"the worker of {self.boundary} did not start:\n{self._errors()}"
                ) from None
        return self.process


@dataclass
class Tally:
    """What became of the cases of a boundary.

    Attributes:
        passed, refused, failed: cases; a case that failed ends the run, those by which it was made small
            count, too.
        seeds: hypothesis drew with those below this number.
        seconds: from the first case to the last.
        failure: the case that failed, which hypothesis made small, and how; "" for none.
    """

    passed: int = 0
    refused: int = 0
    failed: int = 0
    seeds: int = 0
    seconds: float = 0.0
    failure: str = ""

    @property
    def tried(self) -> int:
        return self.passed + self.refused + self.failed


def fuzz(boundary: str, seconds: float) -> Tally:
    """Tries cases for so many seconds, or until one fails, or ends or hangs its process."""
    cases = importlib.import_module(f"fuzz.{boundary}").cases
    tally = Tally()
    with contextlib.closing(Worker(boundary)) as worker:

        @given(cases)
        def attempt(case: Any) -> None:
            result, why = worker.attempt(case)
            result = result if result in ("passed", "refused") else "failed"
            setattr(tally, result, getattr(tally, result) + 1)
            if result == "failed":
                raise FailedError(f"{boundary}, seed {tally.seeds - 1}: {case}\n{why}")

        attempt = hypothesis.settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            derandomize=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(attempt)
        worker.start()  # imports take none of the time
        begin = time.monotonic()
        while (tally.seeds == 0 or tally.seconds < seconds) and not tally.failure:
            tally.seeds += 1
            try:
                hypothesis.seed(tally.seeds - 1)(attempt)()
            except FailedError as error:
                tally.failure = str(error)
            tally.seconds = time.monotonic() - begin
    return tally


class FailedError(Exception):
    """A case that was neither taken nor refused."""
