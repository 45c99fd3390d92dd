"""Models small enough that a test takes milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from million_experts.models import PeerConfig, PeerForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "mlp_layer_types": ["dense", "peer"],
    "peer": {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8, "query_norm": "layer"},
    "dense": {"width": 32},
}


@pytest.fixture(autouse=True)
def _quick_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    # A PEER layer measures its own output to scale it, for 0.4 s: here 2 % are exact enough.
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**13)


@pytest.fixture
def tiny_config() -> Callable[..., PeerConfig]:
    """Makes a configuration; `peer` is merged into the tiny one, other settings replace it."""

    def make(peer: dict[str, Any] | None = None, **settings: Any) -> PeerConfig:
        tiny = copy.deepcopy(TINY)
        tiny["peer"].update(peer or {})
        return PeerConfig(**{**tiny, **settings})

    return make


@pytest.fixture
def tiny_model(tiny_config: Callable[..., PeerConfig]) -> Callable[..., PeerForCausalLM]:
    """Makes a model from the same arguments, with the same weights each time."""

    def make(**settings: Any) -> PeerForCausalLM:
        torch.manual_seed(0)
        return PeerForCausalLM(tiny_config(**settings))

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """[3, 8] token ids, none of them 0: that one pads."""
    return torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(1))
