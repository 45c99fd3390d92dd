"""Tiny cases."""

from __future__ import annotations

import gc

import pytest
import torch

from million_experts.benchmarks.case import Case
from million_experts.benchmarks.cases import layers
from million_experts.benchmarks.workload import Competitor

SHAPE = {"dim": 16, "num_experts": 64, "num_heads": 2, "experts_per_head": 3, "key_dim": 8}


@pytest.fixture(scope="module", autouse=True)
def _quick_initialisation():
    # A benchmark sets the number of threads for its process; the tests that follow want theirs back.
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)
        yield
    torch.set_num_threads(threads)
    gc.collect()


@pytest.fixture
def tiny_layers():
    """All competitors at a shape that takes no time; the compiled one would take seconds."""

    def make(tokens: int = 6, **changes) -> tuple[Competitor, ...]:
        shape = {**SHAPE, **changes}
        found = layers(tokens, dense_width=8, moe_width=8, **shape)
        return tuple(c for c in found if c.name != "torch.compile")

    return make


@pytest.fixture
def tiny_case(tiny_layers):
    def make(*extra: Competitor, memory: bool = False, **changes) -> Case:
        return Case("tiny", "a tiny case", (*tiny_layers(), *extra), memory=memory, **changes)

    return make
