"""Times the Triton kernels on a GPU; ends in a JSON block for `.github/ISSUE_TEMPLATE/gpu-benchmark.md`.

    python -m million_experts.benchmarks.gpu

`make bench-gpu` runs this. Each operation is compared with the reference on the same GPU first: a wrong one
is not timed, and the command fails. One that does not fit in the GPU's memory is left out. Beside its time
stands the least time that the bytes allow which it must move, at the bandwidth of a large copy on this GPU:
each tensor once, and of the table the rows that were picked. `docs/kernels.md` says the same of what must
move, but counts a row again where the cache is too small to keep it.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import million_experts
from million_experts.benchmarks.correctness import BLOCK, blocks
from million_experts.benchmarks.machine import describe
from million_experts.benchmarks.timing import interleave, summarise
from million_experts.ops import available_backends
from million_experts.ops.backends import implementation, interpreted

# Largest difference of a result from the reference's, relative to the largest number, by the result's type.
# float32 holds sums of the same products in another order, and where the inputs are bfloat16 the products are
# exact. bfloat16 is such a sum rounded once: a step of 2**-7 at most. Whole numbers are the same.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Shape:
    """T tokens, H heads of k experts of n * n, D numbers a row, R rows an expert, d a sub-key."""

    T: int
    n: int
    D: int
    dtype: torch.dtype
    H: int = 8
    k: int = 16
    R: int = 2
    d: int = 64

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T={self.T} H={self.H} k={self.k} d={self.d} N={self.n**2} D={self.D} R={self.R} {dtype}"


# A pool of a million in training, the same in bfloat16 and with GLU; one token; many tokens an expert.
SHAPES = (
    Shape(2048, 1024, 256, torch.float32),
    Shape(16384, 1024, 256, torch.bfloat16),
    Shape(8192, 1024, 1024, torch.bfloat16, d=128),
    Shape(8192, 512, 1024, torch.bfloat16, R=3),
    Shape(1, 1024, 1024, torch.bfloat16),
    Shape(8192, 128, 256, torch.bfloat16),
    Shape(2048, 36, 256, torch.float32, k=30),
    Shape(8192, 32, 1024, torch.bfloat16),
)
TINY = (Shape(3, 5, 20, torch.float32, H=2, k=3, d=4),)


Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Part:
    """One operation at one shape: `run(backend)` returns its results; the bytes that it must move.

    `compared` makes of the results what has to agree with the reference's.
    """

    run: Callable[[str], Results]
    necessary_bytes: int
    compared: Callable[..., Results] = lambda *results: results


class Draw:
    """Random tensors of a shape's type, the same at every call of a part."""

    def __init__(self, shape: Shape, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        self.options: dict[str, Any] = {"device": device, "generator": generator}
        self.shape = shape

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(sizes, dtype=dtype or self.shape.dtype, **self.options)

    def picks(self) -> Tensor:
        """Uniform picks, the worst case: real tokens share more experts."""
        shape = self.shape
        return torch.randint(0, shape.n**2, (shape.T, shape.H * shape.k), **self.options)


def retrieval(backward: bool, shape: Shape, device: torch.device) -> Part:
    """Retrieval forward, or the gradient of its scores."""
    draw = Draw(shape, device)
    n, k = shape.n, shape.k
    query, *keys = draw(shape.T, shape.H, 2, shape.d), draw(n, shape.d), draw(n, shape.d)
    scores, picks = implementation("reference").product_key_topk(query, *keys, k)
    necessary = _bytes(query, *keys, scores, picks)
    if backward:
        grad_scores = draw(*scores.shape, dtype=torch.float32)
        return Part(
            lambda backend: implementation(backend).product_key_topk_backward(
                grad_scores, picks, query, *keys
            ),
            necessary + _bytes(query, *keys),
        )
    return Part(
        lambda backend: implementation(backend).product_key_topk(query, *keys, k),
        necessary,
        # Of equal scores either's expert will do: the experts are compared by their scores.
        lambda scores, picks: (scores, scores_at(picks, query, *keys)),
    )


def scores_at(picks_THk: Tensor, query: Tensor, keys1: Tensor, keys2: Tensor) -> Tensor:
    """[T, H, k] float32: scores of the picked experts; NaN for what is none, or is picked twice."""
    n1, n2 = len(keys1), len(keys2)
    ordered, order = picks_THk.sort(-1)
    again = torch.zeros_like(picks_THk, dtype=torch.bool)
    again.scatter_(-1, order[..., 1:], ordered[..., 1:] == ordered[..., :-1])
    wrong = again | (picks_THk < 0) | (picks_THk >= n1 * n2)
    picks_THk = picks_THk.where(~wrong, 0)
    scores = torch.empty(picks_THk.shape, device=query.device)
    some = max(1, BLOCK // max(1, query[:1].numel() * picks_THk.shape[-1]))
    for out, picks, part in zip(scores.split(some), picks_THk.split(some), query.split(some), strict=True):
        halves = keys1[picks // n2], keys2[picks % n2]
        torch.add(
            *((half.float() * part[:, :, i, None].float()).sum(-1) for i, half in enumerate(halves)), out=out
        )
    return scores.where(~wrong, math.nan)


def experts(kind: str, shape: Shape, device: torch.device) -> Part:
    """The experts forward, backward to the touched rows, or backward to all of the table."""
    draw = Draw(shape, device)
    T, D, K, N, R = shape.T, shape.D, shape.H * shape.k, shape.n**2, shape.R
    x, grad_y, gates, table = draw(T, D), draw(T, D), draw(T, K) / K**0.5, draw(N, R, D).div_(D**0.5)
    indices = draw.picks()
    rows = indices.unique()
    pre = implementation("reference").expert_mlp(x, indices, gates, table, "gelu")[1]
    touched = len(rows) * table[0].nbytes
    # Nobody has to move the pre-activations: they can be had again from what is read.
    read = _bytes(x, indices, gates) + touched
    if kind == "forward":
        return Part(
            lambda backend: implementation(backend).expert_mlp(x, indices, gates, table, "gelu"),
            read + _bytes(x),
        )
    arguments = grad_y, x, indices, gates, table, pre, "gelu", True, True
    if kind == "touched":
        return Part(
            lambda backend: implementation(backend).expert_mlp_backward_touched(*arguments),
            read + _bytes(grad_y, x, gates, rows) + touched,
        )
    return Part(
        lambda backend: implementation(backend).expert_mlp_backward(*arguments, True),
        read + _bytes(grad_y, x, gates, table),
    )


def adamw(shape: Shape, device: torch.device) -> Part:
    """A step of row-wise AdamW, with a second moment by row."""
    draw = Draw(shape, device)
    N, R, D = shape.n**2, shape.R, shape.D
    table = draw(N, R, D).div_(D**0.5)
    rows = draw.picks().unique()
    values = draw(len(rows), R, D)
    history = torch.zeros(3, 3, dtype=torch.float64, device=device)
    state = {
        backend: (
            own,
            torch.zeros_like(own),
            torch.zeros(N, R, device=device),
            torch.zeros(N, dtype=torch.int32, device=device),
        )
        for backend, own in (("triton", table), ("reference", table.clone()))  # which change it in place
    }

    def step(backend: str) -> Results:
        options = 0.1, (0.9, 0.99), 1e-8, 0.1, None  # a step that bfloat16's tolerance does not hide
        implementation(backend).rowwise_adamw(*state[backend], history, 1, rows, values, None, None, *options)
        return state[backend]

    # The rows of table, momentum and gradient; the second moment of a row; the step of an expert.
    of_rows = len(rows) * (5 * table[0].nbytes + 2 * (R * 4 + 4))
    return Part(step, of_rows + _bytes(rows, history))


#: How each operation is prepared at a shape, with inputs of its own: one that does not fit costs no other.
PARTS: dict[str, Callable[[Shape, torch.device], Part]] = {
    "retrieval, forward": functools.partial(retrieval, False),
    "retrieval, backward": functools.partial(retrieval, True),
    "experts, forward": functools.partial(experts, "forward"),
    "experts, backward to the touched rows": functools.partial(experts, "touched"),
    "experts, backward, dense": functools.partial(experts, "dense"),
    "row-wise AdamW": adamw,
}


def _bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def compare(actual: Results, expected: Results) -> tuple[float, str | None]:
    """The largest error of some results, and what is wrong with them, if anything is."""
    worst = 0.0
    for i, (one, right) in enumerate(zip(actual, expected, strict=True)):
        error, allowed = _error(one, right), ALLOWED.get(right.dtype, 0.0)
        if error > allowed:
            return error, (
                f"result {i}, {right.dtype} {list(right.shape)}, is {error:.2g} of the largest number away "
                f"from the reference, allowed {allowed:.2g}"
            )
        worst = max(worst, error)
    return worst, None


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite if anything is not finite."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return math.inf
    difference, scale = 0.0, 1e-30
    for one, right in zip(blocks(actual), blocks(expected), strict=True):
        apart = (one.double() - right.double()).abs().max().item()
        if not math.isfinite(apart):  # `max` would pass over NaN
            return math.inf
        difference, scale = max(difference, apart), max(scale, right.abs().max().item())
    return difference / scale


def _timed(run: Callable[[], Any], device: torch.device, litter: Tensor) -> float:
    """Seconds of a run with empty caches."""
    litter.zero_()
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _bandwidth(device: torch.device, size: int) -> float:
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    nothing = source[:0]
    return 2 * size / min(_timed(lambda: target.copy_(source), device, nothing) for _ in range(10))


def measure(
    shape: Shape,
    prepare: Callable[[Shape, torch.device], Part],
    device: torch.device,
    bandwidth: float,
    repetitions: int,
) -> dict[str, Any]:
    """Of one operation: seconds by the kernels and by the reference, in turns, and the roofline.

    `status` says whether that is "timed", or else "wrong", "failed" or "out of memory".
    """
    row: dict[str, Any]
    try:
        return _measure(prepare(shape, device), device, bandwidth, repetitions)
    except torch.OutOfMemoryError:
        row = {"status": "out of memory"}
    except Exception as error:  # a kernel that this GPU refuses must not cost what others took
        row = {"status": "failed", "fault": f"{type(error).__name__}: {error}"}
    _let_go(device)
    return row


def _let_go(device: torch.device) -> None:
    """Gives back the memory of a part that ended early."""
    for _, kernel in _tuned_kernels():
        kernel.nargs = None  # the arguments of its last launch, which are forgotten only if that went well
    if device.type == "cuda":
        # After an access to memory that is not there every call fails; what was measured is printed anyhow.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _measure(part: Part, device: torch.device, bandwidth: float, repetitions: int) -> dict[str, Any]:
    error, fault = compare(*(part.compared(*part.run(backend)) for backend in ("triton", "reference")))
    row = {"necessary_bytes": part.necessary_bytes, "error": error if math.isfinite(error) else None}
    if fault is not None:
        return row | {"status": "wrong", "fault": fault}
    litter = torch.empty(2**10 if device.type == "cpu" else 2**28, dtype=torch.uint8, device=device)
    runs = {
        backend: lambda _, b=backend: _timed(lambda: part.run(b), device, litter)
        for backend in ("triton", "reference")
    }
    seconds = {name: asdict(summarise(taken)) for name, taken in interleave(runs, repetitions, 5.0)}
    least = part.necessary_bytes / bandwidth
    return row | {
        "status": "timed",
        "seconds": seconds["triton"],
        "reference_seconds": seconds["reference"],
        "roofline_seconds": least,
        "share_of_roofline": least / seconds["triton"]["median"],
    }


def chosen_configurations() -> dict[str, dict[str, str]]:
    """What autotuning took, kernel by kernel."""
    return {
        name: {str(key): str(config) for key, config in kernel.cache.items()}
        for name, kernel in _tuned_kernels()
    }


def _tuned_kernels() -> Iterator[tuple[str, Any]]:
    """Triton's `Autotuner` of each kernel that has one, in what has been imported."""
    for module in ("triton_expert_rows", "triton_expert_tiles", "triton_retrieval", "triton_rowwise"):
        for name, function in vars(sys.modules.get(f"million_experts.ops.{module}", million_experts)).items():
            if name.endswith("_kernel") and hasattr(function, "cache"):
                yield name, function


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the Triton kernels on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, also in Triton's interpreter")
    parser.add_argument("--repetitions", type=int, default=30)
    options = parser.parse_args()
    device = torch.device("cpu" if interpreted() else "cuda")
    reason = available_backends()["triton"]
    if reason is None and interpreted() and not options.tiny:
        reason = "Triton's interpreter is too slow for these shapes: --tiny, or without TRITON_INTERPRET"
    if reason is not None:
        print(f"bench-gpu: {reason}", file=sys.stderr)
        return 1
    import triton  # present, or there would be a reason

    bandwidth = _bandwidth(device, 2**20 if options.tiny else 2**30)
    rows = []
    for shape in TINY if options.tiny else SHAPES:
        for name, prepare in PARTS.items():
            measured = measure(shape, prepare, device, bandwidth, 3 if options.tiny else options.repetitions)
            rows.append({"shape": shape.name, "part": name} | measured)
            print(_line(rows[-1]), flush=True)
    machine = describe()
    result = {
        "gpu": _gpu(device),
        "commit": machine["commit"],
        "dirty": machine["dirty"],
        "versions": machine["versions"] | {"triton": triton.__version__},
        "bandwidth_bytes_per_second": bandwidth,
        "rows": rows,
        "configurations": chosen_configurations(),
    }
    print(f"\nPaste this into an issue:\n\n```json\n{json.dumps(result, indent=1, allow_nan=False)}\n```")
    return 1 if any("fault" in row for row in rows) else 0


def _line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:61} {row['part']:38}"
    if row["status"] != "timed":
        return f"{head} {row['status']}{': ' if 'fault' in row else ''}{row.get('fault', '')}"
    median, other = row["seconds"]["median"], row["reference_seconds"]["median"]
    return (
        f"{head} {median * 1e6:10.1f} us, {row['share_of_roofline']:4.0%} of what the memory allows, "
        f"plain PyTorch {other * 1e6:10.1f} us"
    )


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "none: Triton's interpreter"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }


if __name__ == "__main__":
    sys.exit(main())
