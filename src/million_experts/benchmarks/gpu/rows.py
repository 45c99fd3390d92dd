"""Rows of a run: a file of JSON lines that is never rewritten, and what has to stand beside them."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import million_experts

Row = dict[str, Any]

FILE = "rows.jsonl"
PACKAGES = ("torch", "triton", "numpy", "transformers")

#: What makes the command fail.
BAD = ("wrong", "failed", "died", "hung")


class Rows:
    """The file that a run's processes append to; each row is one write, so that none is ever half there.

    Args:
        folder: where the file is or will be.
        run: a name of the run, which all its rows carry.
    """

    def __init__(self, folder: Path, run: str):
        self.path, self.run = folder / FILE, run

    def write(self, row: Row) -> Row:
        """Appends a row with the run and the time; numbers that are not finite become None."""
        row = finite({"run": self.run, "time": round(time.time(), 2)} | row)
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.lseek(file, 0, os.SEEK_END)
            if size and os.pread(file, 1, size - 1) != b"\n":  # a process that was killed while it wrote
                line = b"\n" + line
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
        return row


def read(path: Path) -> list[Row]:
    """The rows of a file, or of the one in a folder; a line that is cut off is left out."""
    path = path / FILE if path.is_dir() else path
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def finished(rows: Iterable[Row], source: str, rehearsal: bool) -> set[tuple[str, str]]:
    """Parts and cases that need not be run again: those that the same source has come to an end with."""
    runs = {
        row["run"]
        for row in rows
        if row.get("part") == "run" and row["source"] == source and row["rehearsal"] == rehearsal
    }
    return {(row["part"], row["case"]) for row in rows if row["run"] in runs and row.get("event") == "end"}


_KEY = ("part", "case", "event", "competitor", "phase", "about", "kernel", "key", "launch", "turn")


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each case and competitor, whichever run it is of."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if "case" in row and row.get("event") != "begin":
            key = tuple(str(row.get(name)) for name in _KEY)
            found.pop(key, None)
            found[key] = row
    return [row for row in found.values() if "status" in row]


def finite(value: Any) -> Any:
    """The value with None in place of floats that JSON has no words for."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def header(commit: str | None, rehearsal: bool, arguments: list[str]) -> Row:
    """The row that a run begins with: commit, digest of the source, processor, versions."""
    found, dirty = _commit()
    return {
        "part": "run",
        "commit": commit or found,
        "dirty": None if commit else dirty,
        "source": source_digest(),
        "rehearsal": rehearsal,
        "arguments": arguments,
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def source_digest() -> str:
    """A name for the code of the package, also where no git is: two runs with the same ran the same code."""
    root, digest = Path(million_experts.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return getattr(sys.modules.get(name), "__version__", None)


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the source, and whether the source differs from it; None where there is no repository."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ":/", ":(top,exclude)docs"))
    except (OSError, subprocess.SubprocessError):
        return None, None
