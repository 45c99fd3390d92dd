"""What is measured: a competitor by description, and the module that it is built into."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from million_experts.benchmarks.optimizers import AdamW, Training

# Those of a case that says nothing else.
PHASES = ("forward", "backward", "step")
PHASE_TITLES = {
    "forward": "forward (inference)",
    "backward": "forward + backward (training)",
    "step": "training step (forward + backward + optimiser)",
    "update": "training step without its forward pass",
}

# Bounds of a copy that is small enough to run for no other purpose than to load libraries and start threads.
_TINY = {
    "dim": 32,
    "num_experts": 256,
    "experts_per_head": 4,
    "key_dim": 16,
    "width": 32,
    "tokens": 8,
    "K": 8,
    "context": 4,
    "vocab_size": 64,
}


class Unavailable(Exception):
    """A competitor cannot be measured here; the message says why."""


@dataclass
class Workload:
    """A competitor ready to run.

    Attributes:
        module: called with what `draw` returns; an optimiser would update its parameters.
        draw: random inputs from a generator, tokens first. Not timed. The same generator state gives all
            competitors of a case the same tokens.
        like_tokens: the result has the shape of the tokens. False for probes, which are no layers.
        ambiguous: for inputs and "training?", which tokens [T] a correct layer may treat differently:
            experts at the border of the top k that score the same up to rounding. None where there are none.
        optimizer: makes the optimiser of a training step, whose state is there in full before anything is
            timed. None for torch's AdamW, and its state as it comes.
        touched: how many rows of expert tables, each counted once, an iteration with these inputs touches.
        part: what stands for it where results are compared with the truth: its layer in the case of a whole
            model, in which rounding in one block decides what the next retrieves.
    """

    module: nn.Module
    draw: Callable[[torch.Generator], tuple[Tensor, ...]]
    like_tokens: bool = True
    ambiguous: Callable[[tuple[Tensor, ...], bool], Tensor] | None = None
    optimizer: Training | None = None
    touched: Callable[[tuple[Tensor, ...]], int] | None = None
    part: "Workload | None" = None


@dataclass(frozen=True)
class Competitor:
    """A competitor by description, so that it can be sent to another process and written into a file.

    Attributes:
        name: as it is shown.
        build: a function of a module (another process has to find it) that takes `shared`, a dict in which
            competitors of a case leave what they have in common, and `arguments`; it returns a `Workload` or
            raises `Unavailable`.
        truth: what it must agree with before it is timed; None for other people's layers.
        shares: name under which builders share parameters; competitors with the same name and the same
            arguments, those aside that shape no parameter, hold one set of them.
        gathers: how many tensors [T, K, D] it keeps, for the estimate of its memory alone.
        warm_up_in_full: its one-off costs, such as compilation, come up at full size only.
    """

    name: str
    build: Callable[..., Workload]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    truth: "Competitor | None" = None
    shares: str | None = None
    gathers: int = 0
    warm_up_in_full: bool = False

    @property
    def share_key(self) -> tuple[Any, ...]:
        """Equal for competitors that hold the same parameters."""
        if self.shares is None:
            return (self.name,)
        return share_key(self.shares, self.arguments)

    def tiny(self) -> "Competitor":
        """The same competitor at a size that takes no time and no memory."""
        small = {
            name: min(value, _TINY[name]) if name in _TINY else value
            for name, value in self.arguments.items()
        }
        return Competitor(self.name, self.build, small)


def share_key(shares: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """See `Competitor.share_key`."""
    own = ("backend", "tokens", "picks", "K", "how", "optimizer")
    return (shares, *sorted((name, value) for name, value in arguments.items() if name not in own))


def draw_inputs(workload: Workload, seed: int, training: bool) -> tuple[Tensor, ...]:
    """New inputs; in training those of floating point want gradients, as they would inside a model."""
    inputs = workload.draw(torch.Generator().manual_seed(seed))
    if training:
        for tensor in inputs:
            if tensor.is_floating_point():
                tensor.requires_grad_(True)
    return inputs


def draw_upstream(inputs: tuple[Tensor, ...]) -> Tensor | None:
    """A random gradient of the output, which is like the tokens; None for a loss, which is of token ids."""
    return torch.randn_like(inputs[0], requires_grad=False) if inputs[0].is_floating_point() else None


def run_once(
    workload: Workload,
    phase: str,
    inputs: tuple[Tensor, ...],
    upstream: Tensor | None,
    optimizer: torch.optim.Optimizer | None,
) -> float:
    """One iteration of a phase; the seconds that count.

    It leaves no gradients: to free them is part of the cost.
    """
    start = time.perf_counter()
    if phase == "forward":
        with torch.no_grad():
            workload.module(*inputs)
        return time.perf_counter() - start
    y = workload.module(*inputs)
    if phase == "update":
        start = time.perf_counter()
    y.backward(upstream)
    if optimizer is not None:
        optimizer.step()
    workload.module.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def prepare(workload: Workload, phase: str) -> torch.optim.Optimizer | None:
    """Sets the mode of the phase; the optimiser that it takes."""
    workload.module.train(phase != "forward")
    if phase not in ("step", "update"):
        return None
    return (workload.optimizer or AdamW())(workload.module)
