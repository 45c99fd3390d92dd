"""Shapes of the experts that are used, their inputs, and a step forward and backward with them."""

from __future__ import annotations

import torch
from torch import Tensor

from million_experts.ops import expert_mlp

# T, K, N, D: few tokens an expert; many, in tiles; a wide model; one token; odd sizes of both kinds.
SHAPES = {
    "few tokens an expert": ((1024, 128, 256**2, 256), (4, 5, 90, 40)),
    "tiles": ((1024, 240, 36**2, 256), (5, 6, 3, 40)),
    "wide": ((256, 64, 128**2, 8192), (2, 3, 20, 300)),
    "one token": ((1, 128, 1024**2, 1024), (1, 4, 50, 40)),
    "odd": ((333, 77, 5003, 1000), (3, 5, 41, 33)),
    "odd tiles": ((301, 77, 601, 1000), (5, 6, 3, 33)),
}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(
    shape: tuple[int, int, int, int], glu: bool, dtype: torch.dtype, device
) -> tuple[Inputs, Tensor]:
    T, K, N, D = shape
    generator = torch.Generator(device).manual_seed(0)
    x, gates, experts, grad_y = (
        torch.randn(s, generator=generator, device=device, dtype=dtype)
        for s in ((T, D), (T, K), (N, 3 if glu else 2, D), (T, D))
    )
    indices = torch.randint(0, N, (T, K), generator=generator, device=device)
    return (x, indices, gates / K**0.5, experts.div_(D**0.5)), grad_y


def step(inputs: Inputs, grad_y: Tensor, backend: str, **options) -> list[Tensor]:
    x, indices, gates, experts = inputs
    x, gates, experts = (t.detach().requires_grad_() for t in (x, gates, experts))
    y = expert_mlp(x, indices, gates, experts, backend=backend, **options)
    y.backward(grad_y)
    return [y.detach(), x.grad, gates.grad, experts.grad]
