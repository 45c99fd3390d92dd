"""Inputs of expert_mlp, and a step forward and backward with them."""

from __future__ import annotations

import torch
from torch import Tensor

from million_experts.ops import expert_mlp

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(
    seed: int = 0,
    T: int = 3,
    K: int = 3,
    N: int = 5,
    D: int = 10,
    glu: bool = False,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3,
) -> tuple[Inputs, Tensor]:
    """x, indices, gates, experts of `dtypes`, so scaled that float16 holds every sum; the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, D), (T, K), (N, 3 if glu else 2, D), (T, D))
    x, gates, experts, grad_y = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(d)
        for s, d in zip(shapes, (*dtypes, dtypes[0]), strict=True)
    )
    return (x, torch.randint(0, N, (T, K), generator=generator), gates, experts / max(1, D) ** 0.5), grad_y


def step(inputs: Inputs, grad_y: Tensor, activation: str = "gelu", **options) -> dict[str, Tensor]:
    """y and the gradients of x, gates and experts."""
    x, indices, gates, experts = inputs
    x, gates, experts = (t.detach().requires_grad_() for t in (x, gates, experts))
    y = expert_mlp(x, indices, gates, experts, activation, **options)
    y.backward(grad_y)
    return {"y": y.detach(), "x": x.grad, "gates": gates.grad, "experts": experts.grad}
