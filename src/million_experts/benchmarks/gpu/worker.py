"""A process that runs the cases of one part, and may die or hang: what it has found is in the file by then.

python -m million_experts.benchmarks.gpu.worker --folder FOLDER --run NAME --part right --until TIME
"""

import argparse
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from million_experts.benchmarks.gpu import rows as files
from million_experts.benchmarks.gpu.plan import Case, make_plan

Row = dict[str, Any]

#: Exit statuses: there is no GPU to check; the GPU answers no call any more.
NO_GPU, BROKEN = 2, 3
#: A case is not begun with less than this share of the time that it is expected to take.
ENOUGH = 0.4


@dataclass
class Context:
    """What cases need beside their arguments."""

    folder: Path
    run: str
    until: float
    rehearsal: bool
    device: Any

    def ceilings(self) -> Any:
        """Those measured last, or those planned with."""
        from million_experts.benchmarks.gpu.costs import PLANNED, Ceilings

        for row in reversed(files.read(self.folder)):
            if row.get("case") == "ceilings" and "products" in row:
                return Ceilings(row["copy"], row["products"])
        return PLANNED


def run_case(case: Case, context: Context) -> Iterator[Row]:
    """The rows of a case as they come."""
    if case.part == "right":
        from million_experts.benchmarks.gpu.right import CASES
        from million_experts.benchmarks.gpu.right_layer import layer

        yield (CASES | {"layer": layer})[case.function](context.device, **case.arguments)
    elif case.part == "fast":
        yield from _fast(case, context)
    elif case.part == "why":
        from million_experts.benchmarks.gpu import why

        worst = why.furthest(files.read(context.folder), 3, 1 if context.rehearsal else why.LEAST_TOKENS)
        if case.function == "counters" and worst:
            yield from why.counters(worst, context.until - time.time() - 2)
        elif case.arguments.get("place", 0) < len(worst):
            yield from why.explain(context.device, worst[case.arguments["place"]])
        else:
            yield {"status": "unavailable", "fault": "nothing was timed that this could be about"}
    else:
        from million_experts.benchmarks.gpu.learns import Size, learn

        left = context.until - time.time() - 1
        until = time.monotonic() + min(left, case.arguments["seconds"] or left)
        size = Size(**case.arguments["size"])
        yield from learn(context.device, Path(case.arguments["text"]), size, until)


def _fast(case: Case, context: Context) -> Iterator[Row]:
    from million_experts.benchmarks.gpu import fast
    from million_experts.benchmarks.gpu.costs import Shape

    clock = fast.Clock(context.device, context.ceilings(), 3 if context.rehearsal else fast.REPETITIONS)
    arguments = dict(case.arguments)
    if "shape" in arguments:
        arguments["shape"] = Shape(**arguments["shape"])
    functions: dict[str, Any] = {
        "ceilings": fast.ceilings, "operation": fast.operation, "layers": fast.layers
    }  # fmt: skip
    yield from functions[case.function](clock, **arguments)


def guarded(case: Case, context: Context, write: Any) -> bool:
    """Runs a case between rows that say that it began and ended; whether the GPU still answers."""
    import torch

    from million_experts.benchmarks.gpu.kernels import let_go

    head = {"part": case.part, "case": case.name}
    write(head | {"event": "begin"})
    start, outcome = time.monotonic(), {}
    try:
        for row in run_case(case, context):
            write(head | row)
    except torch.OutOfMemoryError as error:
        outcome = {"status": "out of memory", "fault": str(error).splitlines()[0][:300]}
    except Exception as error:
        traceback.print_exc()
        outcome = {"status": "failed", "fault": f"{type(error).__name__}: {error}"[:1000]}
    alive = True
    try:
        let_go(context.device)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:  # such as after an access to memory that is not there
        alive, outcome = False, outcome or {"status": "failed", "fault": f"afterwards: {error}"[:1000]}
    write(head | {"event": "end", "seconds_taken": round(time.monotonic() - start, 3)} | outcome)
    return alive


def describe_gpu(device: Any) -> Row:
    """The GPU, for a row of its own."""
    import torch
    import triton

    row: Row = {"part": "machine", "triton": triton.__version__, "torch": torch.__version__}
    if device.type == "cpu":
        return row | {"gpu": "none: Triton's interpreter"}
    found = torch.cuda.get_device_properties(device)
    return row | {
        "gpu": found.name,
        "memory_bytes": found.total_memory,
        "free_bytes": torch.cuda.mem_get_info()[0],
        "multiprocessors": found.multi_processor_count,
        "second_cache_bytes": getattr(found, "L2_cache_size", None),
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "driver": _driver(),
    }


def _driver() -> str | None:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        return next((word for word in words if word[:1].isdigit() and "." in word), None)
    except OSError:
        return None


def _end_with_parent() -> None:
    """Whatever ends the run ends its parts: Linux sends them the signal that it is asked for."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--part", required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since 1970")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--text")
    options = parser.parse_args()
    _end_with_parent()
    if options.rehearse:
        from million_experts.benchmarks.gpu import rehearsal

        rehearsal.prepare()
    import torch

    from million_experts.ops import available_backends

    if (reason := available_backends()["triton"]) is not None:
        print(reason, file=sys.stderr)
        return NO_GPU
    device = torch.device("cpu" if options.rehearse else "cuda")
    file = files.Rows(options.folder, options.run)
    before = files.read(file.path) if file.path.exists() else []
    own = [row for row in before if row["run"] == options.run]
    if not any(row.get("part") == "machine" for row in own):
        file.write(describe_gpu(device))
    done = files.finished(before if options.resume else own, files.source_digest(), options.rehearse)
    context = Context(options.folder, options.run, options.until, options.rehearse, device)
    for case in make_plan(options.rehearse, options.text):
        if case.part != options.part or (case.part, case.name) in done:
            continue
        if time.time() + ENOUGH * case.seconds() > options.until:
            continue
        if not guarded(case, context, file.write):
            sys.stdout.flush()
            os._exit(BROKEN)  # no destructor works either
    return 0


if __name__ == "__main__":
    sys.exit(main())
