"""Where and with what something was measured."""

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import million_experts
from million_experts.ops import resolve_backend

PACKAGES = ("transformers", "PEER-pytorch", "numpy")


def describe() -> dict[str, Any]:
    """What every row carries: commit, machine, versions, threads and the backend that "auto" takes."""
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "machine": {
            "cpu": _cpu_model(),
            "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
            "logical_cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "system": platform.platform(terse=True),
        },
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "million-experts": million_experts.__version__,
            "torch": torch.__version__,
            **{package: _version(package) for package in PACKAGES},
        },
        "backend": resolve_backend("auto"),
    }


def one_line(description: Mapping[str, Any]) -> str:
    """The same for a reader."""
    machine, versions = description["machine"], description["versions"]
    known = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {description['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['instruction_set']}; {known}; "
        f"backend {description['backend']}"
    )


class OtherLoad:
    """How many cores other processes keep busy while a block runs.

    On a machine with no core to spare, threads that wait for each other wait for strangers too: one busy
    process made a layer of many small parallel loops thirty times slower, another layer four times.
    """

    cores = 0.0

    def __enter__(self) -> "OtherLoad":
        self._start = self._seconds()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (now - then for now, then in zip(self._seconds(), self._start, strict=True))
        self.cores = max(0.0, busy - own) / max(wall, 1e-3)

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        everyone, self_ = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = everyone.idle + getattr(everyone, "iowait", 0.0)
        return time.monotonic(), sum(everyone[:8]) - idle, self_.user + self_.system


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the source, and whether the source differs from it; None where it is in no repository.

    Results that a run writes are no change of the source.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside a repository that has nothing to do with it.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ":/", ":(top,exclude)docs"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
