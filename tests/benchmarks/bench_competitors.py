"""Competitors that are wrong, broken or wasteful on purpose; a module, so that other processes find them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from million_experts.benchmarks import parts, peers, steps
from million_experts.benchmarks.optimizers import Rowwise
from million_experts.benchmarks.workload import Workload


class Off(nn.Module):
    """A layer that is right in one mode and off by a little in the other."""

    def __init__(self, layer: nn.Module, what: str):
        super().__init__()
        self.layer, self.what = layer, what

    def forward(self, x):
        y = self.layer(x)
        if self.what == "output":
            return y * 1.01
        if self.what == "gradient" and self.training:
            return y + 0.01 * (y - y.detach())
        if self.what == "nan":
            return torch.where(torch.arange(len(y))[:, None] == 1, float("nan"), y)
        if self.what == "shape":
            return y[:, :-1]
        return y


def off(shared, *, what: str, **arguments) -> Workload:
    workload = peers.peer(shared, **arguments)
    return Workload(Off(workload.module, what), workload.draw)


def broken(shared, **arguments) -> Workload:
    raise RuntimeError("it broke\nin many lines")


class Hoard(nn.Module):
    """Needs a known amount of memory in its forward pass, and keeps a known part of it."""

    def __init__(self, megabytes: int):
        super().__init__()
        self.weight, self.megabytes = nn.Parameter(torch.ones(1)), megabytes

    def forward(self, x):
        block = torch.ones(self.megabytes, 2**18)
        return x * self.weight + block[0, 0]


def hoard(shared, *, megabytes: int, tokens: int) -> Workload:
    return Workload(Hoard(megabytes), peers.draw_tokens(tokens, 4))


def table(shared, **arguments) -> Workload:
    """A table of experts on the reference, which keeps no buffers from one step to the next."""
    return parts.experts(shared, backend="reference", **arguments)


def off_sparse(shared, *, what: str, **arguments) -> Workload:
    """The layer of training steps with something wrong in its sparse gradient; a dense one is left alone."""
    workload = steps.layer(shared, **arguments)

    def spoil(grad):
        if not grad.is_sparse or what == "nothing":
            return grad
        rows, values = grad._indices()[0], grad._values().clone()
        if what == "value":
            values[0, 0, 0] += 0.01 * values.abs().max()
        elif what == "row left out":
            rows, values = rows[1:], values[1:]
        elif what == "another row":
            rows = (rows + 1) % len(grad)
        elif what == "in two parts and out of order":  # as right as one
            rows, values = torch.cat([rows.flip(0), rows]), torch.cat([values.flip(0) / 2, values / 2])
        return torch.sparse_coo_tensor(rows[None], values, grad.shape)

    workload.module.experts.register_hook(spoil)
    return workload


@dataclass(frozen=True)
class OffInBackward(Rowwise):
    """Steps in the backward pass that are not those that it claims."""

    def apart(self) -> Rowwise:
        return Rowwise(second_moment="row")


def off_in_backward(shared, **arguments) -> Workload:
    return replace(steps.layer(shared, **arguments), optimizer=OffInBackward(in_backward=True))


class Slow(nn.Module):
    """Takes its time forward and none backward."""

    def __init__(self, seconds: float):
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.ones(1)), seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x * self.weight


def slow(shared, *, seconds: float, tokens: int) -> Workload:
    return Workload(Slow(seconds), peers.draw_tokens(tokens, 4))
