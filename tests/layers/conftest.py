"""Layers small enough that a test takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from million_experts import PEER
from million_experts.ops import available_backends


@pytest.fixture(autouse=True)
def _quick_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer measures its own output to scale it; only test_initialisation.py needs the exact scale.
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., PEER]:
    """Makes a layer in float64 whose norms and running statistics are not those of a new one."""

    def make(seed: int = 0, **settings: Any) -> PEER:
        torch.manual_seed(seed)
        tiny = {"dim": 5, "num_experts": (4, 3), "num_heads": 2, "experts_per_head": 2, "key_dim": 6}
        layer = PEER(**{**tiny, **settings}).double()
        with torch.no_grad():
            for name, tensor in (*layer.query_norm.named_parameters(), *layer.query_norm.named_buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
        return layer

    return make


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that runs here."""
    reason = available_backends()[request.param]
    if reason:
        pytest.skip(reason)
    return request.param
