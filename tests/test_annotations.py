"""The shapes in the signatures are true: jaxtyping and beartype watch real calls."""

from __future__ import annotations

import subprocess
import sys

CALLS = """
from jaxtyping import install_import_hook

with install_import_hook(("million_experts.ops", "million_experts.layers"), "beartype.beartype"):
    import million_experts.layers, million_experts.ops

import torch
from million_experts.layers import (
    PEER, DenseFeedForward, ExpertChoiceMoE, ExpertUsage, MaskedBatchNorm, MemoryPlus, ProductKeyMemory,
    TokenChoiceMoE,
)
from million_experts.ops import expert_mlp, product_key_topk

for T in (0, 1, 5):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for heads in ((), (3,)):
            query = torch.randn(T, 3, 2, 4, dtype=dtype, requires_grad=True)
            keys1, keys2 = torch.randn(*heads, 6, 4), torch.randn(*heads, 5, 4, dtype=dtype)
            scores, indices = product_key_topk(query, keys1, keys2, 2)
            scores.sum().backward()
        for rows in (2, 3):
            x = torch.randn(T, 7, dtype=dtype, requires_grad=True)
            experts = torch.randn(30, rows, 7, requires_grad=True)
            for mask in (None, torch.ones(T, dtype=torch.bool)):
                y = expert_mlp(x, indices.flatten(1), scores.flatten(1).detach(), experts, mask=mask)
                y.sum().backward()

for norm in ("batch", "layer", "none"):
    for share_keys in (True, False):
        layer = PEER(8, (6, 5), 2, 3, 4, query_norm=norm, share_keys=share_keys)
        for shape in ((4, 8), (2, 3, 8), (1, 2, 3, 8)):
            x = torch.randn(shape, requires_grad=True)
            with ExpertUsage(layer) as usage:
                y, routing = layer(x, mask=torch.ones(shape[:-1], dtype=torch.bool), return_routing=True)
                (y + layer(x)).sum().backward()
            usage.figures()
        layer.eval()(torch.randn(8))
MaskedBatchNorm(3)(torch.randn(4, 3), torch.tensor([True, True, False, True]))
DenseFeedForward(8, glu=True)(torch.randn(2, 3, 8))
x, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
for layer in (ProductKeyMemory(8, 30, 2, 3, 4), MemoryPlus(8, 30, 2, 3, 4)):
    layer(x, mask=mask, return_routing=True)
TokenChoiceMoE(8)(x, mask=mask, return_router_loss=True)
for choice in ("token", "expert"):
    layer = ExpertChoiceMoE(8, 4, eval_choice=choice)
    layer(x, mask=mask)
    layer.eval()(x, mask=mask)
"""

# Results of a shape that the signature does not allow.
BROKEN = {
    "an operation": """
from million_experts.ops import reference
truth = reference.product_key_topk
reference.product_key_topk = lambda *a: (truth(*a)[0][..., :1], truth(*a)[1])
product_key_topk(torch.randn(4, 3, 2, 4), torch.randn(6, 4), torch.randn(6, 4), 2, "reference")
""",
    "a layer": """
layer = DenseFeedForward(8, 11)
layer.up = torch.nn.Linear(11, 9)
layer(torch.randn(3, 8))
""",
    "a norm's argument": """
MaskedBatchNorm(3).eval()(torch.randn(4, 3), torch.ones(5, dtype=torch.bool))
""",
}


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_annotations_are_true_and_false_ones_are_caught():
    attempts = "".join(
        f"""
try:
    exec({script!r})
except Exception as error:
    print({name!r}, type(error).__name__)
"""
        for name, script in BROKEN.items()
    )
    done = run(CALLS + "\nprint('all true')\n" + attempts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["all true", *(f"{name} TypeCheckError" for name in BROKEN)]
