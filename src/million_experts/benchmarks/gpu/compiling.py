"""Kernels compiled on all cores while the first part runs: each binary once, into Triton's own cache.

    python -m million_experts.benchmarks.gpu.compiling --share 0/14 --claims FOLDER

Launchers are called with tensors of the processor, of the types and divisibilities that the plan has; a
launch compiles and runs nothing. What goes wrong here costs no result: a kernel that is not there is compiled
where it is used.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from million_experts.benchmarks.gpu.costs import Shape
from million_experts.benchmarks.gpu.plan import Case, make_plan
from million_experts.ops import available_backends
from million_experts.ops.backends import implementation


class Absent:
    """A driver for a GPU of NVIDIA's that is not there, or that nothing is to be launched on."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        with contextlib.suppress(
            Exception
        ):  # where no driver is installed, there is nothing to build against
            from triton.backends.nvidia.driver import CudaLauncher, library_dirs

            library_dirs()
            self.launcher_cls = CudaLauncher

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(cases: list[Case]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """For each case, in the order of the plan, what launches its kernels."""
    for case in cases:
        a = case.arguments
        if case.function in ("experts", "precision"):
            sizes = _few(a["T"]), a["K"], a["N"], a["D"], a.get("R", 2)
            x = a.get("dtype", "float32")
            kinds = x, a.get("table") or x, a.get("activation", "gelu")
            yield case.name, functools.partial(_experts, *sizes, *kinds)
        elif case.function == "retrieval":
            heads = () if a.get("shared", True) else (a["H"],)
            sizes = _few(a["T"]), a["H"], a["k"], a["n1"], a["n2"]
            yield case.name, functools.partial(_retrieval, *sizes, a["d"], heads, a["dtype"])
        elif case.function in ("operation", "layers"):
            yield case.name, functools.partial(_layer, Shape(**a["shape"]))


def _few(tokens: int) -> int:
    """Fewer tokens with the same code: Triton asks whether a number is 1, or a multiple of 16."""
    return tokens if tokens <= 64 else 64 + tokens % 16


def _layer(shape: Shape) -> None:
    T = _few(shape.T)
    _retrieval(T, shape.H, shape.k, shape.n, shape.n, shape.d, (), shape.dtype)
    _experts(T, shape.K, shape.N, shape.D, shape.R, shape.dtype, shape.dtype, "gelu")
    table = torch.empty(64, shape.R, shape.D, dtype=getattr(torch, shape.dtype))
    state = (
        table,
        table,
        torch.empty(64, shape.R),
        torch.zeros(64, dtype=torch.int32),
        torch.zeros(3, 3).double(),
    )
    rows = torch.arange(16)
    options = 0.1, (0.9, 0.99), 1e-8, 0.1, None
    implementation("triton").rowwise_adamw(*state, 1, rows, table[:16], None, None, *options)


def _experts(T: int, K: int, N: int, D: int, R: int, dtype: str, table: str, activation: str) -> None:
    run, kind = implementation("triton"), getattr(torch, dtype)
    x, gates, pre = torch.empty(T, D, dtype=kind), torch.empty(T, K, dtype=kind), torch.empty(R - 1, T, K)
    # Untouched memory costs nothing, however large the pool is.
    experts, indices = torch.empty(N, R, D, dtype=getattr(torch, table)), torch.randint(0, N, (T, K))
    run.expert_mlp(x, indices, gates, experts, activation)
    run.expert_mlp_backward(x, x, indices, gates, experts, pre, activation, True, True, True)
    run.expert_mlp_backward_touched(x, x, indices, gates, experts, pre, activation, True, True)


def _retrieval(T: int, H: int, k: int, n1: int, n2: int, d: int, heads: tuple[int, ...], dtype: str) -> None:
    run, kind = implementation("triton"), getattr(torch, dtype)
    query = torch.empty(T, H, 2, d, dtype=kind)
    keys = [torch.empty(*heads, n, d, dtype=kind) for n in (n1, n2)]
    run.product_key_topk(query, *keys, k)
    run.product_key_topk_backward(torch.empty(T, H, k), torch.zeros(T, H, k, dtype=torch.int64), query, *keys)


def build_launcher(kernel: Any) -> None:
    """What launches a kernel: older Tritons compile a piece of C for each list of arguments, and keep it."""
    from triton.runtime import driver

    launcher = getattr(driver.active, "launcher_cls", None)
    if launcher is not None:
        with contextlib.suppress(Exception):  # else built at the first launch
            launcher(kernel.src, kernel.metadata)


def compile_share(cases: list[Case], claims: Path, share: int, of: int, until: float) -> int:
    """Compiles what no other process has begun with; returns how many kernels that were.

    Processes begin at different cases, so that they are not after the same kernel at the same time.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    count = 0
    run, compile_one = JITFunction.run, JITFunction._do_compile

    def compile_only(self, *arguments, grid, warmup, **named):
        return run(self, *arguments, grid=grid, warmup=True, **named)

    def claimed(self, key, *others, **named):
        nonlocal count
        name = hashlib.sha256(f"{self.cache_key}{key}".encode()).hexdigest()
        try:
            os.close(os.open(claims / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return None
        count += 1
        kernel = compile_one(self, key, *others, **named)
        build_launcher(kernel)
        return kernel

    def every_configuration(self, *arguments, **named):
        self.nargs = dict(zip(self.arg_names, arguments, strict=False))
        for config in self.prune_configs(named):
            self.fn.run(*arguments, **named, **config.all_kwargs())

    replaced = {
        (JITFunction, "run"): compile_only,
        (JITFunction, "_do_compile"): claimed,
        (Autotuner, "run"): every_configuration,
    }
    kept = {(owner, name): getattr(owner, name) for owner, name in replaced}
    for (owner, name), function in replaced.items():
        setattr(owner, name, function)
    try:
        todo = list(launches(cases))
        first = share * len(todo) // of
        for _, launch in todo[first:] + todo[:first]:
            if time.time() >= until:
                break
            try:
                launch()
            except Exception:
                traceback.print_exc()  # whoever wants the kernel will say so
    finally:
        for (owner, name), function in kept.items():
            setattr(owner, name, function)
    return count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--claims", type=Path, required=True)
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--capability", type=int, help="of a GPU that is not there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    capability = options.capability
    if not capability:
        if available_backends()["triton"] is not None:
            return  # the worker says why
        if torch.version.hip is None:  # a context of CUDA's for each of these processes would cost seconds
            major, minor = torch.cuda.get_device_capability()
            capability = 10 * major + minor
    if capability:
        import triton

        triton.runtime.driver.set_active(Absent(capability))
    share, of = map(int, options.share.split("/"))
    print(compile_share(make_plan(), options.claims, share, of, options.until), flush=True)


if __name__ == "__main__":
    main()
