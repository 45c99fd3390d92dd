"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from million_experts.layers import Routing

from .versions import cache_argument

__all__ = ["PeerCausalLMOutput", "PeerModelOutput"]


@dataclass
class PeerModelOutput(BaseModelOutputWithPast):
    """What `PeerModel` returns.

    `routing`, if asked for, has one `Routing` for each layer with product keys, in order: its `indices`,
    `gates` and `scores` are [batch, sequence, heads, experts per head]. `router_loss` is the sum of the
    routers' own losses, in training alone and where a layer has one.
    """

    routing: tuple[Routing, ...] | None = None
    router_loss: Tensor | None = None


@dataclass
class PeerCausalLMOutput(CausalLMOutputWithPast):
    """What `PeerForCausalLM` returns; `routing` and `router_loss` as in `PeerModelOutput`.

    In training `loss` contains `router_loss`.
    """

    routing: tuple[Routing, ...] | None = None
    router_loss: Tensor | None = None


if cache_argument() != "cache":  # the name that code for every version may read
    for output in (PeerModelOutput, PeerCausalLMOutput):
        output.cache = property(lambda self: self.past_key_values)  # type: ignore[attr-defined]
