"""Compiles every kernel as it is launched, for GPUs that are not there, and prints what each binary needs.

    python compile_kernels.py sm_90 [--quick]

Run without TRITON_INTERPRET. The launchers are called with tensors of the CPU; a launch compiles the kernel
for the target, once for each configuration that autotuning may choose (`--quick`: for the first), and runs
nothing. So what is compiled is what users get: types, divisibility, constants and configurations come from
the launchers themselves.

Prints a JSON list of the dicts of `needs`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Of the text: atomic operations on memory, and loads of 16 bytes.
INSTRUCTIONS = {
    "sm": (r"\b(?:atom|red)\.", r"\bld\.global[.\w:]*\.v4\.b32"),
    "gfx": (
        r"\b(?:global|flat|buffer|ds)_(?:atomic|cmpst|cmpswap|add|inc|dec)_\w+",
        r"\b(?:global|buffer)_load_dwordx4",
    ),
}

# A case: a name, whether it is one of the few that `make test` compiles, and what to launch.
Case = tuple[str, bool, Callable[[], Any]]


class Absent:
    """A driver for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def needs(name: str, kernel, target: str) -> dict[str, Any]:
    """Registers, spills and shared memory of a compiled kernel, read from its binary.

    Also, from its text, how many instructions are atomic, and how many load 16 bytes a thread.
    """
    text = kernel.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    atomic, wide = INSTRUCTIONS["gfx" if target.startswith("gfx") else "sm"]
    result = {
        "kernel": name,
        "target": target,
        "warps": kernel.metadata.num_warps,
        "atomics": len(re.findall(atomic, text)),
        "wide_loads": len(re.findall(wide, text)),
    }
    if target.startswith("gfx"):

        def read(field: str) -> int:
            return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

        return result | {
            "registers": read("vgpr_count"),
            "scalar_registers": read("sgpr_count"),
            "spills": read("vgpr_spill_count") + read("sgpr_spill_count"),
            "local_bytes": read("private_segment_fixed_size"),
            "shared_bytes": max(read("group_segment_fixed_size"), kernel.metadata.shared),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    # A kernel keeps in its stack what does not fit in registers.
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return result | {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "local_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": used["SHARED"] + kernel.metadata.shared,
    }


def compile_launches(target: str, launch: Callable[[], Any], first: bool) -> Iterator[tuple[str, Any]]:
    """Name and binary of each kernel that `launch` launches, in the first configuration or in each."""
    triton.runtime.driver.set_active(Absent(TARGETS[target]))
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **named):
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        compiled.append((self.__name__, kernel))
        return kernel

    def every_configuration(self, *args, **named):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(named)[: 1 if first else None]:
            kernel = self.fn.run(*args, **named, **config.all_kwargs())
        return kernel

    JITFunction.run, tuned = compile_only, Autotuner.run
    Autotuner.run = every_configuration
    try:
        launch()
    finally:
        JITFunction.run, Autotuner.run = run, tuned
    yield from compiled


def main() -> None:
    import launches
    import launches_experts

    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seen, results = set(), []
    for case, quick, launch in [*launches.CASES, *launches_experts.CASES]:
        if (options.quick and not quick) or options.only not in case:
            continue
        for name, kernel in compile_launches(options.target, launch, options.quick):
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            results.append({"case": case} | needs(name, kernel, options.target))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
