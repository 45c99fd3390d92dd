"""Inputs of expert_mlp, and a step forward and backward with them."""

from __future__ import annotations

import torch
from torch import Tensor

from million_experts.ops import expert_mlp

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(
    seed: int,
    T: int,
    K: int,
    N: int,
    D: int,
    glu: bool,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3,
) -> tuple[Inputs, Tensor]:
    """x, indices, gates, experts of `dtypes`, so scaled that float16 holds every sum; the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, D), (T, K), (N, 3 if glu else 2, D), (T, D))
    x, gates, experts, grad_y = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(d)
        for s, d in zip(shapes, (*dtypes, dtypes[0]), strict=True)
    )
    experts = experts / D**0.5
    return (x, torch.randint(0, N, (T, K), generator=generator), gates, experts), grad_y


def step(inputs: Inputs, grad_y: Tensor, activation: str, **options) -> dict[str, Tensor]:
    """y and the gradients of x, gates and experts."""
    x, indices, gates, experts = inputs
    x, gates, experts = (t.detach().requires_grad_() for t in (x, gates, experts))
    y = expert_mlp(x, indices, gates, experts, activation, **options)
    y.backward(grad_y)
    of_table = experts.grad.to_dense() if experts.grad.is_sparse else experts.grad
    return {"y": y.detach(), "x": x.grad, "gates": gates.grad, "experts": of_table}
