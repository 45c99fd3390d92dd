"""The product's compiled kernels as Triton keeps them: configurations, registers, occupancy."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


def tuned_kernels() -> Iterator[tuple[str, Any]]:
    """Triton's `Autotuner` of each kernel that has one, in what has been imported."""
    from triton.runtime.autotuner import Autotuner

    return _instances(Autotuner)


def _instances(kind: type) -> Iterator[tuple[str, Any]]:
    seen = set()
    for module in [m for name, m in sys.modules.items() if name.startswith("million_experts.ops")]:
        for name, function in list(vars(module).items()):
            if isinstance(function, kind) and id(function) not in seen:
                seen.add(id(function))
                yield name, function


@contextlib.contextmanager
def forced(number: int) -> Iterator[dict[str, int]]:
    """Each tuned kernel runs with the configuration of that number, or with its last; nothing is tried out.

    Yields:
        How many configurations each kernel that ran may choose from.
    """
    from triton.runtime.autotuner import Autotuner

    counts: dict[str, int] = {}
    run = Autotuner.run

    def take(self, *arguments, **named):
        self.nargs = dict(zip(self.arg_names, arguments, strict=False))
        usable = self.prune_configs(named) if len(self.configs) > 1 else self.configs
        counts[self.base_fn.__name__] = len(usable)
        config = usable[min(number, len(usable) - 1)]
        result = self.fn.run(*arguments, **named, **config.all_kwargs())
        self.nargs = None
        return result

    Autotuner.run = take
    try:
        yield counts
    finally:
        Autotuner.run = run


def choices(told: set[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """What autotuning took, kernel by kernel, but for what has been told; it is told now."""
    found: dict[str, dict[str, str]] = {}
    for name, kernel in tuned_kernels():
        for key, config in kernel.cache.items():
            if (name, str(key)) not in told:
                told.add((name, str(key)))
                found.setdefault(name, {})[str(key)] = str(config)
    return found


def let_go(device: torch.device) -> None:
    """Gives back the memory of a case that ended early."""
    if "triton" in sys.modules:
        for _, kernel in tuned_kernels():
            kernel.nargs = None  # the arguments of its last launch, which it forgets only if that went well
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compiled() -> Iterator[dict[str, Any]]:
    """Registers, spills, shared memory and occupancy of each kernel that this process has loaded."""
    from triton.runtime.jit import JITFunction, KernelInterface

    for name, tuned in _instances(KernelInterface):
        function = tuned
        while hasattr(function, "fn") and not isinstance(function, JITFunction):
            function = function.fn
        if not isinstance(function, JITFunction):
            continue
        for device, cache in function.device_caches.items():
            for key, kernel in list(cache[0].items()):
                if getattr(kernel, "n_regs", None) is None:
                    continue  # compiled and never launched
                warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
                yield {
                    "kernel": name,
                    "key": str(key)[:200],
                    "warps": warps,
                    "stages": getattr(kernel.metadata, "num_stages", None),
                    "registers": kernel.n_regs,
                    "spills": kernel.n_spills,
                    "shared_bytes": shared,
                } | occupancy(kernel.n_regs, shared, warps, torch.cuda.get_device_properties(device))


def occupancy(registers: int, shared: int, warps: int, device: Any) -> dict[str, Any]:
    """How many blocks fit on a multiprocessor, and what binds them: registers, shared memory or warps.

    Registers are given to warps 256 at a time, shared memory to blocks 1 KiB more than they ask for.
    """
    lanes = getattr(device, "warp_size", 32)
    most_warps = device.max_threads_per_multi_processor // lanes
    of_warp = -(-max(1, registers) * lanes // 256) * 256
    limits = {
        "registers": device.regs_per_multiprocessor // of_warp // warps,
        "shared memory": device.shared_memory_per_multiprocessor // (shared + 1024),
        "warps": most_warps // warps,
        "blocks": 32,
    }
    bound = min(limits, key=lambda name: limits[name])
    blocks = limits[bound]
    return {"blocks": blocks, "occupancy": blocks * warps / most_warps, "bound_by": bound}
