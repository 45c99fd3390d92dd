"""Part 3: why is it slow? Of the operations furthest from their roofline, what each kernel takes and needs.

Registers, spills and occupancy come from the compiled kernels, times from PyTorch's profiler, and counters
from `ncu` where it is and may read them. It leaves the clocks alone.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from million_experts.benchmarks.gpu import operations
from million_experts.benchmarks.gpu.costs import Shape
from million_experts.benchmarks.gpu.kernels import compiled

Row = dict[str, Any]

#: Fewer tokens than this are another question: launches, not kernels.
LEAST_TOKENS = 1024
#: The kernel of `torch.cuda._sleep`: what comes after it is of the next operation.
MARK = "spin_kernel"
#: What ncu gets, however late it is.
LEAST_SECONDS = 5.0

METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "lts__t_sector_hit_rate.pct": "second_cache_hits_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "processor_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}


def furthest(rows: list[Row], count: int, tokens: int = LEAST_TOKENS) -> list[Row]:
    """The timed operations that are furthest from their roofline, worst first; each operation once."""
    timed = [
        row
        for row in rows
        if row.get("part") == "fast" and row.get("competitor") == "PEER" and row.get("status") == "timed"
    ]
    timed = [row for row in timed if row["shape"]["T"] >= tokens]
    timed.sort(key=lambda row: -row["over_roofline"])
    worst: dict[str, Row] = {}
    for row in timed:
        worst.setdefault(row["phase"], row)
    return list(worst.values())[:count]


def explain(device: torch.device, row: Row) -> Iterator[Row]:
    """Rows about the kernels of an operation that was timed: what was compiled, what each takes."""
    name, shape = row["phase"], Shape(**row["shape"])
    head: Row = {
        "phase": name,
        "shape": row["shape"],
        "over_roofline": row["over_roofline"],
        "status": "done",
    }
    yield head | {"about": "operation", "median": row["seconds"]["median"]}
    run = operations.prepare(name, shape, device).run
    before = {(r["kernel"], r["key"]) for r in compiled()}
    for _ in range(2):
        run("triton")
    for found in compiled():
        if (found["kernel"], found["key"]) not in before:
            yield head | {"about": "binary"} | found
    if device.type == "cuda":
        yield from (head | {"about": "times"} | found for found in _times(lambda: run("triton")))


def _times(run: Callable[[], Any]) -> Iterator[Row]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:20]:
        yield {
            "kernel": event.key[:120],
            "microseconds": event.self_device_time_total,
            "launches": event.count,
        }


def find_ncu() -> str | None:
    """Where Nsight Compute is, if it is."""
    places = [*Path("/usr/local").glob("cuda*/bin/ncu"), *Path("/opt/nvidia/nsight-compute").glob("*/ncu")]
    return shutil.which("ncu") or next((str(p) for p in sorted(places, reverse=True)), None)


def counters(rows: list[Row], seconds: float) -> Iterator[Row]:
    """What `ncu` counts in a run of each operation, kernel by kernel; else one row that says why not."""
    program = find_ncu()
    if program is None:
        yield {"about": "counters", "status": "unavailable", "fault": "ncu is not installed"}
        return
    asked = [{"phase": row["phase"], "shape": row["shape"]} for row in rows]
    command = [
        program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
        "--print-units", "base", "--launch-count", "100", "--metrics", ",".join(METRICS),
        sys.executable, "-m", "million_experts.benchmarks.gpu.why", json.dumps(asked),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(LEAST_SECONDS, seconds)
        )
        said, fault = done.stdout, f"status {done.returncode}"
        told = (done.stdout + done.stderr).strip().splitlines()[-3:]
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        fault, told = f"no end after {seconds:.0f} s", []
    except OSError as error:
        said, fault, told = "", f"{type(error).__name__}: {error}", []
    count = 0
    for operation, found in parse(said):
        if operation < len(asked):
            count += 1
            yield {"about": "counters", "status": "done"} | asked[operation] | found
    if not count:
        text = f"ncu counted nothing, {fault}: {' / '.join(told)}"[:500]
        yield {"about": "counters", "status": "unavailable", "fault": text}


def parse(text: str) -> Iterator[tuple[int, Row]]:
    """Rows of ncu's table, and which of the operations they are of: `MARK` is launched before each.

    The table comes after whatever else is said; the line below its names has units.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    operation = -1
    for record in csv.DictReader(lines[start:]):
        if not record["ID"].strip().isdigit():
            continue
        if MARK in record["Kernel Name"]:
            operation += 1
            continue
        row: Row = {"kernel": record["Kernel Name"][:120], "launch": int(record["ID"])}
        for metric, name in METRICS.items():
            try:
                row[name] = float((record.get(metric) or "").replace(",", ""))
            except ValueError:
                row[name] = None
        yield operation, row


def main() -> None:
    """Runs operations once each in the region that ncu looks at."""
    runs = []
    for asked in json.loads(sys.argv[1]):
        run = operations.prepare(asked["phase"], Shape(**asked["shape"]), torch.device("cuda")).run
        for _ in range(2):
            run("triton")
        runs.append(run)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for run in runs:
        torch.cuda._sleep(1)  # MARK
        run("triton")
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    os._exit(0)  # what is left to do at the end of a profiled process takes seconds


if __name__ == "__main__":
    main()
