"""The process that tries cases: `python -m fuzz.worker BOUNDARY` reads them from stdin, answers on stdout.

A case is plain data. It passes, is refused by an exception that callers can expect, or fails by any other. A
boundary that promises fewer kinds of exceptions than those here has `REFUSALS` of its own.
"""

from __future__ import annotations

import importlib
import os
import pickle
import struct
import sys
import traceback
import warnings
from typing import Any, BinaryIO

REFUSALS = (ValueError, TypeError, IndexError, BufferError, OSError, RuntimeError, MemoryError)


def send(pipe: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message)
    pipe.write(struct.pack("<q", len(data)) + data)
    pipe.flush()


def receive(pipe: BinaryIO) -> Any:
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(pipe.read(struct.unpack("<q", head)[0]))


def outcome(boundary: Any, case: Any) -> tuple[str, str]:
    try:
        boundary.attempt(case)
    except getattr(boundary, "REFUSALS", REFUSALS) as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception:
        return "failed", traceback.format_exc()
    return "passed", ""


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a case prints is no answer
    warnings.simplefilter("ignore")
    if "ME_KERNELS" in os.environ:  # the kernels with sanitizers, see tests/sanitize
        importlib.import_module("sanitized")
    boundary = importlib.import_module(f"fuzz.{sys.argv[1]}")
    send(answers, ("ready", ""))
    while True:
        try:
            case = receive(sys.stdin.buffer)
        except EOFError:
            return
        send(answers, outcome(boundary, case))


if __name__ == "__main__":
    main()
