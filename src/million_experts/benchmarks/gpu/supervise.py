"""Runs the parts one after another, each in a process of its own, and keeps the time whatever they do."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from million_experts.benchmarks.gpu.plan import Case, make_plan
from million_experts.benchmarks.gpu.rows import Rows, read
from million_experts.benchmarks.gpu.worker import NO_GPU

Row = dict[str, Any]

WORKER = "million_experts.benchmarks.gpu.worker"
LOG, COMPILERS_LOG = "log.txt", "compiling.txt"
POLL = 0.1
#: Processes that end without having begun a case, one after another, after which a part is given up.
FAILED_STARTS = 2
#: Processes that compile, at most; one core is left for what launches the kernels.
COMPILERS = 14


class Stopped(Exception):
    """Somebody asked the run to end."""


@dataclass
class Watch:
    """What a part's process is at, as its rows say."""

    path: Path
    seen: int = 0
    case: str | None = None
    since: float = 0.0
    begun: int = 0
    rows: list[Row] = field(default_factory=list)

    def look(self, run: str) -> list[Row]:
        """The rows of the run that have come since."""
        if not self.path.exists():
            return []
        rows = read(self.path)
        new, self.seen = rows[self.seen :], len(rows)
        new = [row for row in new if row["run"] == run]
        for row in new:
            if row.get("event") == "begin":
                self.case, self.since, self.begun = row["case"], time.time(), self.begun + 1
            elif row.get("event") == "end":
                self.case = None
        return new


@dataclass
class Run:
    """A run of the plan's parts.

    Attributes:
        limits: by when each part ends, in seconds since the run began.
        show: is told of each row.
    """

    file: Rows
    limits: dict[str, float]
    rehearsal: bool
    resume: bool
    text: str | None
    show: Callable[[Row], None]
    start: float = field(default_factory=time.time)

    def parts(self) -> None:
        """Runs all parts.

        Raises:
            Stopped: at a signal; the part's process has been ended.
            RuntimeError: there is no GPU here.
        """
        with self._compilers() as compilers:
            for part, limit in self.limits.items():
                if part != "right":  # nothing else is to run where times are taken
                    _end(*compilers)
                self._part(part, self.start + limit)

    def _part(self, part: str, until: float) -> None:
        patience = {c.name: c.patience() for c in make_plan(self.rehearsal, self.text) if c.part == part}
        watch = Watch(self.file.path)
        watch.look("")
        failed = 0
        while failed < FAILED_STARTS and time.time() < until:
            begun = watch.begun
            status, said = self._process(part, until, watch, patience)
            if status == NO_GPU:
                raise RuntimeError(said.splitlines()[-1] if said else "there is no GPU")
            if status == 0:
                return
            failed = failed + 1 if watch.begun == begun else 0
        if failed:
            row = {"part": part, "case": "start", "event": "end", "status": "failed", "fault": said}
            self.show(self.file.write(row))

    def _process(self, part: str, until: float, watch: Watch, patience: dict[str, float]) -> tuple[int, str]:
        """One process; its exit status, or 0 where its time was up, and the end of what it said."""
        command = [
            sys.executable, "-m", WORKER, "--run", self.file.run,
            "--folder", str(self.file.path.parent), "--part", part, "--until", repr(until),
        ]  # fmt: skip
        command += ["--rehearse"] * self.rehearsal + ["--resume"] * self.resume
        command += ["--text", self.text] if self.text else []
        log = self.file.path.parent / LOG
        with log.open("ab") as out:
            begin = out.tell()
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        outcome, killed = "died", False
        try:
            while process.poll() is None:
                time.sleep(POLL)
                self._tell(watch)
                if time.time() > until + 1:
                    killed = True
                    break
                if watch.case and time.time() > watch.since + patience.get(watch.case, 60.0):
                    outcome = "hung"
                    break
        finally:
            _end(process)
        self._tell(watch)
        said = log.read_bytes()[begin:].decode(errors="replace").strip()
        status = process.poll()
        if watch.case is not None and not killed:
            fault = (
                f"no end after {patience.get(watch.case, 60.0):.0f} s"
                if outcome == "hung"
                else f"exit status {status}: {said[-500:]}"
            )
            row = {"part": part, "case": watch.case, "event": "end", "status": outcome, "fault": fault}
            self.show(self.file.write(row))
            watch.look(self.file.run)
        watch.case = None
        return (0 if killed else -1 if status is None else status), said[-500:]

    def _tell(self, watch: Watch) -> None:
        for row in watch.look(self.file.run):
            self.show(row)

    @contextlib.contextmanager
    def _compilers(self) -> Iterator[list[subprocess.Popen]]:
        """Processes that compile the kernels while the first part runs."""
        if self.rehearsal:
            yield []
            return
        count = max(1, min(COMPILERS, (os.cpu_count() or 2) - 2))
        module = "million_experts.benchmarks.gpu.compiling"
        until = self.start + self.limits.get("right", 60.0)
        with tempfile.TemporaryDirectory() as claims:
            command = [sys.executable, "-m", module, "--claims", claims, "--until", repr(until)]
            log = (self.file.path.parent / COMPILERS_LOG).open("ab")
            processes = [
                subprocess.Popen(
                    [*command, "--share", f"{i}/{count}"], stdout=log, stderr=log, start_new_session=True
                )
                for i in range(count)
            ]
            log.close()
            try:
                if "right" not in self.limits:
                    _wait(processes, until)
                yield processes
            finally:
                _end(*processes)


def _wait(processes: list[subprocess.Popen], until: float) -> None:
    while time.time() < until and any(process.poll() is None for process in processes):
        time.sleep(POLL)


def _end(*processes: subprocess.Popen) -> None:
    """Ends processes and what they have started; one that the driver holds on to is left."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A signal to end, or a closed terminal, becomes `Stopped`."""

    def stop(number: int, frame: Any) -> None:
        for each in signals:  # a second one shall not cost the summary
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    signals = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.signal(number, stop) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def not_reached(cases: list[Case], rows: list[Row]) -> list[Case]:
    """The cases of a plan that none of the rows says has ended."""
    ended = {(row["part"], row["case"]) for row in rows if row.get("event") == "end"}
    return [case for case in cases if (case.part, case.name) not in ended]
