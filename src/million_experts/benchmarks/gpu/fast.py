"""Part 2: how fast? Ceilings of the machine first, then operations and layers beside them.

Times are CUDA events around what is measured, after a warm-up, with the second cache full of something else;
medians of runs in turns. Nothing is timed that gives a wrong result.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from million_experts.benchmarks.gpu import operations
from million_experts.benchmarks.gpu.compare import compare
from million_experts.benchmarks.gpu.costs import PLANNED, Ceilings, Cost, Shape
from million_experts.benchmarks.gpu.kernels import choices, let_go
from million_experts.benchmarks.gpu.right_layer import NARROW, WIDE, compare_layer
from million_experts.benchmarks.gpu.rivals import OURS, RIVALS
from million_experts.benchmarks.timing import interleave, summarise
from million_experts.layers import PEER

Row = dict[str, Any]

# Of one competitor in one phase: repetitions, and seconds after which three are enough.
REPETITIONS, LIMIT = 25, 0.25
# More than second caches hold.
LITTER_BYTES = 2**28
TOKENS_COMPARED = 64
INPUTS = 3

# What autotuning took and a row has told.
_told: set[tuple[str, str]] = set()


@dataclass
class Clock:
    """Times on a device, against the ceilings that were measured on it."""

    device: torch.device
    ceilings: Ceilings = PLANNED
    repetitions: int = REPETITIONS
    _litter: list[Tensor] = field(default_factory=list)

    def seconds(self, run: Callable[[], Any], cold: bool = True) -> float:
        """Of one run, with `cold` caches."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        if not self._litter:
            self._litter.append(torch.empty(LITTER_BYTES, dtype=torch.uint8, device=self.device))
        if cold:
            self._litter[0].zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def in_turns(self, runs: dict[str, Callable[[int], Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Medians and quartiles of what takes the number of a round."""
        timed = {name: lambda count, run=run: self.seconds(lambda: run(count)) for name, run in runs.items()}
        for name, taken in interleave(timed, self.repetitions, LIMIT):
            yield name, asdict(summarise(taken))

    def _round(self, run: Callable[[int], Any], count: int) -> float:
        return self.seconds(lambda: run(count))

    def row(self, seconds: dict[str, Any], cost: Cost, dtype: str) -> Row:
        """A time beside its roofline."""
        least = self.ceilings.seconds(cost, dtype)
        return {
            "status": "timed",
            "seconds": seconds,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "roofline_seconds": least,
            "over_roofline": seconds["median"] / least,
        }


def ceilings(clock: Clock, *, copy: int, product: int, rows: int) -> Iterator[Row]:
    """Bytes per second of a copy, FLOP/s of products, and rows of 1 KiB read at random, for comparison."""
    device = clock.device
    pair = torch.empty(2, copy, dtype=torch.uint8, device=device).random_(0, 255)

    def best(run: Callable[[], Any], count: int = 10) -> float:
        clock.seconds(run)
        return min(clock.seconds(run) for _ in range(count))

    found: Row = {"copy": 2 * copy / best(lambda: pair[1].copy_(pair[0]))}
    products = {}
    for dtype in ("bfloat16", "float32", "float64"):
        size = product if dtype == "bfloat16" else product // 2
        a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        products[dtype] = 2 * size**3 / best(functools.partial(torch.matmul, a, b))
    products["float16"] = products["bfloat16"]
    table = torch.randn(rows, 256, device=device)
    at = torch.randint(0, rows, (rows,), device=device)
    found["random_rows"] = 2 * table.nbytes / best(lambda: table.index_select(0, at))
    yield found | {"status": "done", "products": products}


def operation(clock: Clock, name: str, shape: Shape) -> Iterator[Row]:
    """One operation, compared with the reference on the same GPU first."""
    prepared = operations.prepare(name, shape, clock.device)
    actual, truth = (prepared.compared(*prepared.run(backend)) for backend in ("triton", "reference"))
    errors = [compare(f"result {i}", *pair) for i, pair in enumerate(zip(actual, truth, strict=True))]
    row: Row = {
        "competitor": "PEER",
        "phase": name,
        "shape": asdict(shape),
        "error": max(e.norm for e in errors),
    }
    if faults := [e.fault for e in errors if e.fault]:
        yield row | {"status": "wrong", "fault": "; ".join(faults)}
        return
    del actual, truth
    for _, seconds in clock.in_turns({"PEER": lambda _: prepared.run("triton")}):
        yield row | clock.row(seconds, prepared.cost, shape.dtype) | {"configurations": choices(_told)}


def layers(clock: Clock, shape: Shape, competitors: list[str], phases: list[str]) -> Iterator[Row]:
    """Layers in turns, phase by phase; who does not fit or cannot run here is left out, and says so."""
    shared: dict[str, nn.Module] = {}
    modules: dict[str, nn.Module] = {}
    distinct = None
    head = {"shape": asdict(shape)}
    for name in competitors:
        build = functools.partial(RIVALS[name].build, shape, clock.device, shared)
        outcome, module = _attempt(build, name in OURS)
        if module is not None and name in OURS:
            failed, wrong = _attempt(functools.partial(_check, module, shape, clock.device), True)
            outcome = failed or wrong
            if distinct is None and outcome is None:
                distinct = _distinct(module, shape, clock.device)
        if outcome is not None:
            yield head | {"competitor": name, "phase": "all"} | outcome
            let_go(clock.device)
            continue
        modules[name] = module
    dtype = getattr(torch, shape.dtype)
    inputs = [torch.randn(shape.T, shape.D, device=clock.device, dtype=dtype) for _ in range(INPUTS)]
    upstream = torch.randn_like(inputs[0])
    for phase in phases:
        runs: dict[str, Callable[[int], Any]] = {}
        peaks = {}
        for name, module in modules.items():
            make = functools.partial(_make_run, module, phase, inputs, upstream, RIVALS[name].optimizer)
            outcome, made = _attempt(make, name in OURS)
            if outcome is not None:
                yield head | {"competitor": name, "phase": phase} | outcome
                module.zero_grad(set_to_none=True)
                let_go(clock.device)
                continue
            runs[name], peaks[name] = made
        for name, seconds in clock.in_turns(runs):
            cost = RIVALS[name].cost(shape, phase, distinct)
            row = clock.row(seconds, cost, shape.dtype) | {"distinct": distinct, "peak_bytes": peaks[name]}
            yield head | {"competitor": name, "phase": phase} | row
        runs.clear()
        let_go(clock.device)


def _attempt(make: Callable[[], Any], own: bool) -> tuple[Row | None, Any]:
    """A row that says why there is nothing, or the result. A rival that cannot run is no fault."""
    try:
        return None, make()
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}, None
    except Exception as error:
        if "CUDA error" in str(error):  # after which no call works
            raise
        status = "failed" if own else "unavailable"
        return {"status": status, "fault": f"{type(error).__name__}: {error}"[:500]}, None


def _make_run(
    module: nn.Module, phase: str, inputs: list[Tensor], upstream: Tensor, optimizer: Any
) -> tuple[Callable[[int], None], int | None]:
    """What runs a phase once, warm; and the bytes that it takes above what was there."""
    module.train(phase != "forward")
    device = upstream.device
    if phase == "forward":

        @torch.no_grad()
        def forward(count: int) -> None:
            module(inputs[count % INPUTS])

        return forward, _warm(forward, device)
    step = optimizer(module.parameters()).step if phase == "step" else None

    def train(count: int) -> None:
        module(inputs[count % INPUTS].detach().requires_grad_()).backward(upstream)
        if step is not None:
            step()
        module.zero_grad(set_to_none=True)

    return train, _warm(train, device)


def _warm(run: Callable[[int], None], device: torch.device) -> int | None:
    """Runs what is slow at first: compilation, tuning, an optimiser's state. Bytes above what was there."""
    run(0)
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(1)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _check(module: nn.Module, shape: Shape, device: torch.device) -> Row | None:
    """Compares the layer on some tokens, forward and backward; None if it is right."""
    assert isinstance(module, PEER)
    tokens = max(2, min(shape.T, TOKENS_COMPARED))  # BatchNorm has no statistics of one
    x, grad_y = torch.randn(2, tokens, shape.D, device=device, dtype=getattr(torch, shape.dtype))
    bounds = WIDE if shape.dtype == "float32" else NARROW
    errors, faults = compare_layer(module.train(), x, grad_y, bounds=bounds)
    found = [e.fault for e in errors if e.fault] + [fault for fault in faults if fault]
    return {"status": "wrong", "fault": "; ".join(found)} if found else None


@torch.no_grad()
def _distinct(module: nn.Module, shape: Shape, device: torch.device) -> int:
    """How many experts the layer uses at the shape, each counted once."""
    assert isinstance(module, PEER)
    x = torch.randn(shape.T, shape.D, device=device, dtype=getattr(torch, shape.dtype))
    module.train(shape.T > 1)
    return module(x, return_routing=True)[1].indices.unique().numel()
