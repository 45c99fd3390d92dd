"""Runs every kernel as built with sanitizers: `run.py KERNELS.so`; `make sanitize` builds them.

Anything else runs so too, such as the tests: `run.py KERNELS.so -m pytest -p sanitized tests/ops`. The first
report of a sanitizer ends the process with an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# Leaks are not looked for: Python and torch keep much until the end. Failed allocations must reach the tests.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def libraries() -> str:
    """What must be loaded before Python: the sanitizer, and the C++ runtime whose exceptions it watches."""
    compiler = os.environ.get("CXX", "g++")
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            sys.exit(f"{compiler} has no {name}: `make sanitize` needs gcc with its sanitizers")
        paths.append(os.path.realpath(path))
    return " ".join(paths)


def main(kernels: str, *command: str) -> int:
    environment = os.environ | OPTIONS
    environment |= {
        "LD_PRELOAD": libraries(),
        "PYTHONPATH": str(HERE),
        "ME_KERNELS": os.path.abspath(kernels),
    }
    command = command or (str(HERE / "every_kernel.py"),)
    return subprocess.run([sys.executable, *command], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
