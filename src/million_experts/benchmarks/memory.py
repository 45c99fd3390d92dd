"""Peak memory of a competitor, in a process of its own, and an estimate of it before anything is built.

In one process an allocator hands one competitor what another has given back, and a peak would show less
than was needed. Hence each competitor runs in a fresh process, where only its own past can be found.
"""

import ctypes
import gc
import importlib
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from million_experts.benchmarks.optimizers import AdamW, settle
from million_experts.benchmarks.workload import (
    Competitor,
    Unavailable,
    Workload,
    draw_inputs,
    draw_upstream,
    prepare,
    run_once,
)
from million_experts.ops import available_backends

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc keeps freed blocks up to 32 MiB for later, by a threshold that adapts to what a program does. Fixed at
# 1 MiB, resident memory is what is in use.
_MMAP_THRESHOLD = ("MALLOC_MMAP_THRESHOLD_", str(2**20))


class Peak(NamedTuple):
    """Bytes of resident memory at the peak of a phase.

    Attributes:
        added: above the start, which is the process with the weights built and nothing run.
        working: above weights and optimiser state; None where the workload names no optimiser.
        process: all that the process has held until the end of the phase, building included.
    """

    added: int
    working: int | None
    process: int


def can_measure() -> bool:
    """Whether the system resets and shows a process's peak, as Linux does."""
    return STATUS.exists() and os.access(CLEAR_REFS, os.W_OK)


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process now, or at its peak (VmHWM) since the last `reset_peak`."""
    match = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert match, f"{STATUS} has no {field}"
    return int(match[1]) * 1024


def reset_peak() -> None:
    """Makes the present resident memory the peak."""
    CLEAR_REFS.write_text("5")


def release() -> None:
    """Gives free memory back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others do not
    if trim is not None:
        trim(0)


def release_kept() -> None:
    """Frees the buffers that the kernels keep: of what a step works with, nothing is there before it."""
    if available_backends()["cpu"] is None:
        importlib.import_module("million_experts.ops.cpu").release_buffers()
    release()


def measure_peaks(competitor: Competitor, phases: Sequence[str], threads: int) -> dict[str, Peak]:
    """The peak of each phase, measured in a new process.

    What a phase leaves behind counts in the next one: a buffer that is kept is memory too.

    Raises:
        Unavailable: the competitor cannot be built, or its process ended early.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure_and_send, args=(sender, competitor, tuple(phases), threads), daemon=True
    )
    with _environment(*_MMAP_THRESHOLD):
        process.start()
    sender.close()
    try:
        answer = receiver.recv()
        process.join(10)  # seconds for what a compiler has started beside it to end in order
    except EOFError:
        process.join()
        raise Unavailable(f"the process that measured memory ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, str):
        raise Unavailable(answer)
    return answer


def _measure_and_send(
    sender: Connection, competitor: Competitor, phases: tuple[str, ...], threads: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    torch.set_num_threads(threads)
    answer: dict[str, Peak] | str
    try:
        answer = peaks(competitor, phases)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    sender.send(answer)
    sender.close()


def peaks(competitor: Competitor, phases: Iterable[str]) -> dict[str, Peak]:
    """`measure_peaks` in this process, which should be a fresh one."""
    torch.manual_seed(0)
    phases = tuple(phases)
    if not competitor.warm_up_in_full:
        _warm_up(competitor.tiny(), phases)
        release()
    workload = competitor.build({}, **competitor.arguments)
    if competitor.warm_up_in_full:
        for phase in phases:
            if phase not in ("step", "update"):
                _iterate(workload, phase, None, 1)
    release()
    start = resident_bytes()
    highest = resident_bytes("VmHWM")
    found = {}
    for phase in phases:
        optimizer = prepare(workload, phase)
        release()
        reset_peak()
        ready = None
        if optimizer is not None and workload.optimizer is not None:
            _iterate(workload, phase, optimizer, 1)
            settle(optimizer)
            highest = max(highest, resident_bytes("VmHWM"))
            release_kept()
            ready = resident_bytes()
            reset_peak()
        # The first step makes the optimiser's state, the second has it beside everything else.
        _iterate(workload, phase, optimizer, 2)
        peak = resident_bytes("VmHWM")
        highest = max(highest, peak)
        working = None if ready is None else max(0, peak - ready)
        found[phase] = Peak(max(0, peak - start), working, highest)
        del optimizer
    return found


def _warm_up(competitor: Competitor, phases: Iterable[str]) -> None:
    """Loads libraries and starts threads, which a model has long done when it comes to this layer."""
    workload = competitor.build({}, **competitor.arguments)
    for phase in phases:
        _iterate(workload, phase, prepare(workload, phase), 2)


def _iterate(workload: Workload, phase: str, optimizer: torch.optim.Optimizer | None, count: int) -> None:
    training = phase != "forward"
    workload.module.train(training)
    for seed in range(count):
        inputs = draw_inputs(workload, seed, training)
        run_once(workload, phase, inputs, draw_upstream(inputs) if training else None, optimizer)


def estimate_bytes(
    competitor: Competitor, phase: str, alive: frozenset[tuple[Any, ...]] = frozenset()
) -> tuple[int, int]:
    """Bytes that a competitor will keep through a phase, and bytes more that it takes for an iteration.

    Args:
        alive: share keys of competitors that are built already.

    Raises:
        Unavailable: the competitor cannot be built.
    """
    with torch.device("meta"):
        workload = competitor.build({}, **competitor.arguments)
    weights = sum(p.numel() * p.element_size() for p in workload.module.parameters())
    kept = 0 if competitor.share_key in alive else weights
    shape = competitor.arguments
    working = weights if phase == "backward" else 0  # gradients
    if phase in ("step", "update"):
        picks = shape["tokens"] * shape.get("num_heads", 1) * shape.get("experts_per_head", 0)
        state, working = (workload.optimizer or AdamW()).estimate(workload.module, picks)
        kept += state
    if competitor.gathers:
        chosen = shape["num_heads"] * shape["experts_per_head"]
        working += competitor.gathers * shape["tokens"] * chosen * shape["dim"] * 4
    # Scores of all sub-keys, activations and their gradients; those of a language model, and its logits.
    sub_keys = 2 * shape.get("num_heads", 1) * math.isqrt(shape.get("num_experts", 1))
    blocks, logits = shape.get("blocks", 1), shape.get("vocab_size", 0)
    working += 4 * 4 * shape["tokens"] * (sub_keys + 8 * blocks * shape["dim"] + logits)
    return kept, working


@contextmanager
def _environment(name: str, value: str):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
