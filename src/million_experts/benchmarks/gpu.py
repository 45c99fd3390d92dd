"""Times the Triton kernels on a GPU; ends in a JSON block for `.github/ISSUE_TEMPLATE/gpu-benchmark.md`.

    python -m million_experts.benchmarks.gpu

`make bench-gpu` runs this. Each operation is compared with the reference on the same GPU first: a wrong one
is not timed, and the command fails. Beside its time stands the least time that the bytes allow which it must
move, at the bandwidth of a large copy on this GPU: each tensor once, and of the table the rows that were
picked.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import million_experts
from million_experts.benchmarks.machine import describe
from million_experts.benchmarks.timing import interleave, summarise
from million_experts.ops import available_backends
from million_experts.ops.backends import implementation

# Largest difference from the reference, relative to the largest number. Both round a sum once.
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
        return f"T={self.T} H={self.H} k={self.k} N={self.n**2} D={self.D} R={self.R} {dtype}"


# A pool of a million in training, the same in bfloat16 and with GLU; one token; many tokens an expert.
SHAPES = (
    Shape(2048, 1024, 256, torch.float32),
    Shape(16384, 1024, 256, torch.bfloat16),
    Shape(8192, 1024, 1024, torch.bfloat16),
    Shape(8192, 512, 1024, torch.bfloat16, R=3),
    Shape(1, 1024, 1024, torch.bfloat16),
    Shape(8192, 128, 256, torch.bfloat16),
    Shape(2048, 36, 256, torch.float32, k=30),
    Shape(8192, 32, 1024, torch.bfloat16),
)
TINY = (Shape(3, 5, 20, torch.float32, H=2, k=3, d=4),)


@dataclass(frozen=True)
class Part:
    """One operation at one shape: `run(backend)` returns its results; the bytes that it must move."""

    name: str
    run: Callable[[str], tuple[Tensor, ...]]
    necessary_bytes: int


def parts(shape: Shape, device: torch.device) -> Iterator[Part]:
    """The operations of a layer of that shape, with inputs drawn anew for each shape."""
    generator = torch.Generator(device).manual_seed(0)
    T, D, K, N, R = shape.T, shape.D, shape.H * shape.k, shape.n**2, shape.R

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=shape.dtype)

    query, keys1, keys2 = draw(T, shape.H, 2, shape.d), draw(shape.n, shape.d), draw(shape.n, shape.d)
    scores, picks = implementation("reference").product_key_topk(query, keys1, keys2, shape.k)
    grad_scores = torch.randn(scores.shape, generator=generator, device=device)
    of_retrieval = _bytes(query, keys1, keys2, scores, picks)
    yield Part(
        "retrieval, forward",
        # Of equal scores either's expert will do: the scores are compared.
        lambda backend: implementation(backend).product_key_topk(query, keys1, keys2, shape.k)[:1],
        of_retrieval,
    )
    yield Part(
        "retrieval, backward",
        lambda backend: implementation(backend).product_key_topk_backward(
            grad_scores, picks, query, keys1, keys2
        ),
        of_retrieval + _bytes(query, keys1, keys2),
    )

    x, grad_y, gates, experts = draw(T, D), draw(T, D), draw(T, K) / K**0.5, draw(N, R, D) / D**0.5
    # Uniform picks, the worst case: real tokens share more experts.
    indices = torch.randint(0, N, (T, K), generator=generator, device=device)
    rows = indices.unique()
    pre = implementation("reference").expert_mlp(x, indices, gates, experts, "gelu")[1]
    expert = R * D * shape.dtype.itemsize
    read = _bytes(x, indices, gates, pre) + len(rows) * expert
    arguments = grad_y, x, indices, gates, experts, pre, "gelu", True, True
    yield Part(
        "experts, forward",
        lambda backend: implementation(backend).expert_mlp(x, indices, gates, experts, "gelu"),
        read + _bytes(x),
    )
    yield Part(
        "experts, backward to the touched rows",
        lambda backend: implementation(backend).expert_mlp_backward_touched(*arguments),
        read + _bytes(grad_y, x, gates, rows) + len(rows) * expert,
    )
    yield Part(
        "experts, backward, dense",
        lambda backend: implementation(backend).expert_mlp_backward(*arguments, True),
        read + _bytes(grad_y, x, gates, experts),
    )
    history = torch.zeros(3, 3, dtype=torch.float64, device=device)
    values = draw(len(rows), R, D)
    state = {
        backend: (
            experts.clone(),
            torch.zeros_like(experts),
            torch.zeros(N, R, device=device),  # a second moment a row
            torch.zeros(N, dtype=torch.int32, device=device),
        )
        for backend in ("triton", "reference")  # which change it in place
    }

    def adamw(backend: str) -> tuple[Tensor, ...]:
        options = 1e-3, (0.9, 0.99), 1e-8, 0.1, None
        implementation(backend).rowwise_adamw(*state[backend], history, 1, rows, values, None, None, *options)
        return state[backend]

    small = len(rows) * (R * 4 + 4)
    yield Part("row-wise AdamW", adamw, 5 * len(rows) * expert + 2 * small)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def _error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    worst = 0.0
    for one, right in zip(actual, expected, strict=True):
        if right.numel():
            scale = max(right.abs().max().item(), 1e-30)
            worst = max(worst, (one.double() - right.double()).abs().max().item() / scale)
    return worst


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
    shape: Shape, device: torch.device, bandwidth: float, repetitions: int
) -> Iterator[dict[str, Any]]:
    """A row for each operation: seconds by the kernels and by the reference, in turns, and the roofline."""
    litter = torch.empty(2**10 if device.type == "cpu" else 2**28, dtype=torch.uint8, device=device)
    for part in parts(shape, device):
        error = _error(part.run("triton"), part.run("reference"))
        row = {
            "shape": shape.name,
            "part": part.name,
            "error": error,
            "necessary_bytes": part.necessary_bytes,
        }
        if not error <= ALLOWED[shape.dtype]:  # NaN included
            yield row | {"fault": f"differs from the reference by more than {ALLOWED[shape.dtype]}"}
            continue
        runs = {
            backend: lambda _, b=backend, p=part: _timed(lambda: p.run(b), device, litter)
            for backend in ("triton", "reference")
        }
        seconds = {name: asdict(summarise(taken)) for name, taken in interleave(runs, repetitions, 5.0)}
        least = part.necessary_bytes / bandwidth
        yield row | {
            "seconds": seconds["triton"],
            "reference_seconds": seconds["reference"],
            "roofline_seconds": least,
            "share_of_roofline": least / seconds["triton"]["median"],
        }


def chosen_configurations() -> dict[str, dict[str, str]]:
    """What autotuning took, kernel by kernel."""
    chosen = {}
    for name in ("triton_expert_rows", "triton_expert_tiles", "triton_retrieval", "triton_rowwise"):
        for kernel, function in vars(sys.modules.get(f"million_experts.ops.{name}", million_experts)).items():
            if kernel.endswith("_kernel") and hasattr(function, "cache"):
                chosen[kernel] = {str(key): str(config) for key, config in function.cache.items()}
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the Triton kernels on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, also in Triton's interpreter")
    parser.add_argument("--repetitions", type=int, default=30)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = available_backends()["triton"]
    if reason is None and device.type == "cpu" and not options.tiny:
        reason = "no GPU that CUDA or ROCm reaches; Triton's interpreter is too slow for these shapes"
    if reason is not None:
        print(f"bench-gpu: {reason}", file=sys.stderr)
        return 1
    bandwidth = _bandwidth(device, 2**20 if options.tiny else 2**30)
    rows = []
    for shape in TINY if options.tiny else SHAPES:
        try:
            for row in measure(shape, device, bandwidth, 3 if options.tiny else options.repetitions):
                rows.append(row)
                print(_line(row), flush=True)
        except torch.cuda.OutOfMemoryError:
            rows.append({"shape": shape.name, "fault": "does not fit in the memory of this GPU"})
            print(_line(rows[-1]), flush=True)
    machine = describe()
    result = {
        "gpu": _gpu(device),
        "commit": machine["commit"],
        "dirty": machine["dirty"],
        "versions": machine["versions"] | {"triton": importlib.metadata.version("triton")},
        "bandwidth_bytes_per_second": bandwidth,
        "rows": rows,
        "configurations": chosen_configurations(),
    }
    print(f"\nPaste this into an issue:\n\n```json\n{json.dumps(result, indent=1)}\n```")
    return 1 if any("fault" in row for row in rows) else 0


def _line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:55} {row.get('part', ''):38}"
    if "fault" in row:
        return f"{head} {row['fault']}"
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
