"""Competitors that are wrong, broken or wasteful on purpose; a module, so that other processes find them."""

from __future__ import annotations

import torch
from torch import nn

from million_experts.benchmarks import parts, peers
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
