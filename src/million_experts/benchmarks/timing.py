"""Time of competitors that take turns."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from million_experts.benchmarks.optimizers import settle
from million_experts.benchmarks.workload import Workload, draw_inputs, draw_upstream, prepare, run_once

LEAST_REPETITIONS = 3
# More than the caches of the processors that this was run on hold.
LITTER_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration: the median, the quartiles, and of how many."""

    median: float
    q1: float
    q3: float
    repetitions: int


def summarise(seconds: list[float]) -> Times:
    """Median and quartiles."""
    q1, median, q3 = (float(v) for v in np.percentile(seconds, [25, 50, 75]))
    return Times(median, q1, q3, len(seconds))


def interleave(
    runs: Mapping[str, Callable[[int], float]], repetitions: int, limit: float
) -> Iterator[tuple[str, list[float]]]:
    """Calls every `run(round)`, which returns its seconds, in turns, each round in another order.

    A machine that others use is slower at one time than at another: taking turns, all meet the same times.
    A run ends after `repetitions`, or when it has taken `limit` seconds in three or more.

    Yields:
        Names with their seconds, whenever one has ended.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    active, count = list(runs), 0
    while active:
        start = count % len(active)
        for name in active[start:] + active[:start]:
            times[name].append(runs[name](count))
        count += 1
        for name in list(active):
            done = len(times[name])
            if done >= repetitions or (done >= LEAST_REPETITIONS and sum(times[name]) >= limit):
                active.remove(name)
                yield name, times[name]


@functools.cache
def _litter() -> torch.Tensor:
    return torch.zeros(LITTER_BYTES, dtype=torch.uint8)


def make_run(workload: Workload, phase: str, cold: bool = False) -> Callable[[int], float]:
    """A function of the round that draws new inputs, runs the phase once and returns its seconds.

    `cold` writes to more memory than the caches hold before each iteration, untimed.
    """
    optimizer = prepare(workload, phase)
    training = phase != "forward"

    def run(count: int) -> float:
        inputs = draw_inputs(workload, count + 1, training)
        upstream = draw_upstream(inputs) if training else None
        if cold:
            _litter().add_(1)
        return run_once(workload, phase, inputs, upstream, optimizer)

    if workload.optimizer is not None and optimizer is not None:
        run(1_000_000)  # makes the state
        settle(optimizer)
    return run


def warm_up(run: Callable[[int], float]) -> None:
    """Runs what is slow the first time: compilation, first touch of memory, a processor that idles."""
    run(1_000_001)
    for count in range(1_000_002, 1_000_012):
        if run(count) > 0.02:  # seconds; what takes longer than that has warmed everything
            break
