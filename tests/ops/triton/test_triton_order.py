"""A warp's sum has one order whichever configuration autotuning takes: read from what the compiler made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent


def layouts(target: str) -> dict[str, list[str]]:
    """For each form of `dots_kernel`, how its configurations share the columns of a sum out to lanes."""
    import torch
    from compile_kernels import compile_launches

    from million_experts.ops.triton_expert_rows import ByToken

    found = {}
    indices = torch.zeros(4, 16, dtype=torch.int64)
    for D in (64, 256, 99):
        for dtype in (torch.float32, torch.bfloat16):
            x, experts = torch.empty(4, D, dtype=dtype), torch.empty(8, 3, D, dtype=dtype)
            for slots in ((1,), (0, 2)):
                launch = lambda i=indices, x=x, e=experts, s=slots: ByToken(i, 8).dots(x, e, s)  # noqa: E731
                of_configs = []
                for _, kernel in compile_launches(target, launch, False):
                    text = kernel.asm["ttgir"]
                    summed = set(re.findall(r"\(tensor<\d+x\d+xf32, (#\w+)>\) -> tensor<[^>]*slice", text))
                    of_configs += [
                        re.search(rf"^{layout} = (.*)$", text, re.MULTILINE)[1] for layout in summed
                    ]
                found[f"{D} {dtype} {slots}"] = of_configs
    return found


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_configurations_share_columns_out_alike(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, target], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for form, of_configs in json.loads(done.stdout).items():
        assert len(of_configs) == 2, form
        assert len(set(of_configs)) == 1, (form, of_configs)
        assert "warpsPerCTA = [1, 1]" in of_configs[0]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    print(json.dumps(layouts(sys.argv[1])))
