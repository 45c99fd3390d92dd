"""The operations alone: inputs at a shape, how they run, and what has to agree with the reference."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from million_experts.benchmarks.gpu import costs
from million_experts.benchmarks.gpu.costs import Cost, Shape
from million_experts.ops.backends import implementation

Results = tuple[Tensor, ...]

# Bytes of the rows that `scores_at` gathers at a time.
GATHERED = 2**28


@dataclass(frozen=True)
class Operation:
    """One operation at one shape: `run(backend)` returns its results; what it must move and compute.

    `compared` makes of the results what has to agree with the reference's.
    """

    run: Callable[[str], Results]
    cost: Cost
    compared: Callable[..., Results] = lambda *results: results


class Draw:
    """Random tensors of a shape's type."""

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)
        self.options: dict[str, Any] = {"device": device, "generator": generator}
        self.shape, self.dtype = shape, getattr(torch, shape.dtype)

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(sizes, dtype=dtype or self.dtype, **self.options)

    def picks(self) -> Tensor:
        """Uniform picks, the worst case: real tokens share more experts."""
        shape = self.shape
        return torch.randint(0, shape.N, (shape.T, shape.K), **self.options)


def prepare(name: str, shape: Shape, device: torch.device) -> Operation:
    """One of `costs.OPERATIONS` with random inputs of its own: one that does not fit costs no other."""
    return _PREPARE[name](shape, device)


def _retrieval(backward: bool, shape: Shape, device: torch.device) -> Operation:
    draw = Draw(shape, device)
    n, k = shape.n, shape.k
    query, *keys = draw(shape.T, shape.H, 2, shape.d), draw(n, shape.d), draw(n, shape.d)
    if backward:
        grad_scores = draw(shape.T, shape.H, k, dtype=torch.float32)
        picks = draw.picks().view(shape.T, shape.H, k)
        return Operation(
            lambda backend: implementation(backend).product_key_topk_backward(
                grad_scores, picks, query, *keys
            ),
            costs.operation("retrieval, backward", shape),
        )
    return Operation(
        lambda backend: implementation(backend).product_key_topk(query, *keys, k),
        costs.operation("retrieval, forward", shape),
        # Of equal scores either's expert will do: the experts are compared by their scores.
        lambda scores, picks: (scores, scores_at(picks, query, *keys)),
    )


def scores_at(picks_THk: Tensor, query: Tensor, keys1: Tensor, keys2: Tensor) -> Tensor:
    """[T, H, k] float32: scores of the experts given; NaN for what is none, or is there twice.

    float64 where the query is.
    """
    n1, n2 = keys1.shape[-2], keys2.shape[-2]
    wide = torch.promote_types(query.dtype, torch.float32)
    ordered, order = picks_THk.sort(-1)
    again = torch.zeros_like(picks_THk, dtype=torch.bool)
    again.scatter_(-1, order[..., 1:], ordered[..., 1:] == ordered[..., :-1])
    wrong = again | (picks_THk < 0) | (picks_THk >= n1 * n2)
    picks_THk = picks_THk.where(~wrong, 0)
    heads = torch.arange(query.shape[1], device=query.device)[:, None]
    scores = torch.empty(picks_THk.shape, device=query.device, dtype=wide)
    some = max(1, GATHERED // max(1, query[:1].numel() * picks_THk.shape[-1] * wide.itemsize))
    for out, picks, part in zip(scores.split(some), picks_THk.split(some), query.split(some), strict=True):
        rows = (picks // n2, picks % n2)
        halves = [
            keys[at] if keys.dim() == 2 else keys[heads, at]
            for keys, at in zip((keys1, keys2), rows, strict=True)
        ]
        first, second = (
            (half.to(wide) * part[:, :, i, None].to(wide)).sum(-1) for i, half in enumerate(halves)
        )
        torch.add(first, second, out=out)
    return scores.where(~wrong, math.nan)


def _experts(kind: str, shape: Shape, device: torch.device) -> Operation:
    draw = Draw(shape, device)
    T, D, N, R = shape.T, shape.D, shape.N, shape.R
    x, gates, table = draw(T, D), draw(T, shape.K) / shape.K**0.5, draw(N, R, D).div_(D**0.5)
    indices = draw.picks()
    cost = costs.operation(kind, shape, indices.unique().numel())
    if kind == "experts, forward":
        return Operation(
            lambda backend: implementation(backend).expert_mlp(x, indices, gates, table, "gelu"), cost
        )
    grad_y = draw(T, D)
    pre = draw(R - 1, T, shape.K, dtype=torch.float32)  # any numbers: the gradient is a function of them
    arguments = grad_y, x, indices, gates, table, pre, "gelu", True, True
    if kind == "experts, backward, dense":
        return Operation(lambda backend: implementation(backend).expert_mlp_backward(*arguments, True), cost)
    return Operation(lambda backend: implementation(backend).expert_mlp_backward_touched(*arguments), cost)


def _adamw(shape: Shape, device: torch.device) -> Operation:
    """A step with a second moment per row."""
    draw = Draw(shape, device)
    N, R, D = shape.N, shape.R, shape.D
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
        # The reference's memory is wanted once: to be compared, before the kernels are timed.
        return state[backend] if backend == "triton" else state.pop(backend)

    return Operation(step, costs.operation("row-wise AdamW", shape, len(rows)))


_PREPARE: dict[str, Callable[[Shape, torch.device], Operation]] = {
    "retrieval, forward": functools.partial(_retrieval, False),
    "retrieval, backward": functools.partial(_retrieval, True),
    "row-wise AdamW": _adamw,
    **{name: functools.partial(_experts, name) for name in costs.OPERATIONS if name.startswith("experts")},
}
