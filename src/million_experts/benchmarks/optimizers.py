"""Optimisers of training steps: how one is made for a module, and the memory that it takes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from million_experts.layers import PEER
from million_experts.optim import RowwiseAdamW, clip_grad_norm_, parameter_groups

# A small rate: the gradients are of random numbers, and hundreds of steps must leave sound weights.
RATE = 1e-5
# Rows whose gradient is there at a time when the table is updated while it comes.
IN_BACKWARD_BYTES = 8 * 2**20


class Training(Protocol):
    """How a module is trained."""

    def __call__(self, module: nn.Module, parameters: Iterable[Any] | None = None) -> torch.optim.Optimizer:
        """An optimiser of the module's parameters, or of those given (or groups of them)."""

    def estimate(self, module: nn.Module, picks: int) -> tuple[int, int]:
        """Bytes of its state, and of gradients and temporaries, where a step picks that many experts."""


@dataclass(frozen=True)
class AdamW:
    """torch's."""

    fused: bool = False

    def __call__(self, module: nn.Module, parameters: Iterable[Any] | None = None) -> torch.optim.Optimizer:
        given = module.parameters() if parameters is None else parameters
        return torch.optim.AdamW(given, lr=RATE, fused=self.fused or None)

    def estimate(self, module: nn.Module, picks: int) -> tuple[int, int]:
        weights = sum(p.numel() * p.element_size() for p in module.parameters())
        # Without fusing, its temporaries have the size of the largest table, which is nearly all there is.
        return 2 * weights, weights if self.fused else 2 * weights


@dataclass(frozen=True)
class Rowwise:
    """`RowwiseAdamW`, and sparse gradients of tables."""

    second_moment: str = "element"
    momentum_dtype: torch.dtype | None = None
    in_backward: bool = False

    def __call__(self, module: nn.Module, parameters: Iterable[Any] | None = None) -> torch.optim.Optimizer:
        layers = [layer for layer in module.modules() if isinstance(layer, PEER)]
        if self.in_backward:
            for layer in layers:
                # A table steps for one optimiser as long as it lives: each gets its own, of the same numbers.
                layer.experts = nn.Parameter(layer.experts.detach())
        optimizer = RowwiseAdamW(
            module.parameters() if parameters is None else parameters,
            lr=RATE,
            second_moment=self.second_moment,
            momentum_dtype=self.momentum_dtype,
        )
        if self.in_backward:
            optimizer.fuse_into_backward(*layers)
        return optimizer

    def apart(self) -> "Rowwise":
        """The same steps, taken after the backward pass."""
        return replace(self, in_backward=False)

    def estimate(self, module: nn.Module, picks: int) -> tuple[int, int]:
        tables = {id(m.experts): m.experts for m in module.modules() if isinstance(m, PEER)}
        rest = sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in tables)
        state, working = 2 * rest, rest
        for table in tables.values():
            N, R, D = table.shape
            momentum = (self.momentum_dtype or torch.float32).itemsize
            # Moments, and the step that a row last took part in.
            state += table.numel() * momentum + 4 * N * R * (D if self.second_moment == "element" else 1)
            state += 4 * N
            gradient = min(picks, N) * R * D * table.element_size()
            working += min(gradient, IN_BACKWARD_BYTES) if self.in_backward else gradient
        return state, working


@dataclass(frozen=True)
class AsInTraining:
    """An optimiser as `million-experts train` sets it up: parameter groups, and gradients clipped first."""

    optimizer: AdamW | Rowwise
    max_norm: float = 1.0
    table_betas: tuple[float, float] | None = None

    def __call__(self, module: nn.Module, parameters: Iterable[Any] | None = None) -> torch.optim.Optimizer:
        if parameters is None:
            parameters = parameter_groups(module, RATE, weight_decay=0.1, table_betas=self.table_betas)
        made = self.optimizer(module, parameters)

        def clip(*_: Any) -> None:
            clip_grad_norm_(module.parameters(), self.max_norm)

        if self.max_norm > 0:
            made.register_step_pre_hook(clip)
        return made

    def estimate(self, module: nn.Module, picks: int) -> tuple[int, int]:
        return self.optimizer.estimate(module, picks)


# By the names that competitors give in their arguments.
OPTIMIZERS: dict[str, AdamW | Rowwise] = {
    "AdamW": AdamW(),
    "AdamW, fused": AdamW(fused=True),
    "RowwiseAdamW": Rowwise(),
    "RowwiseAdamW, in backward": Rowwise(in_backward=True),
    "RowwiseAdamW, small state": Rowwise(second_moment="row", momentum_dtype=torch.bfloat16),
}


def settle(optimizer: torch.optim.Optimizer) -> None:
    """Writes every number of an optimiser's state back to where it is.

    Moments that begin as zeros take memory where they were written to, and no sooner: without this a few
    steps would seem to need less than training does, and pay for what it does once.
    """
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.mul_(1)
