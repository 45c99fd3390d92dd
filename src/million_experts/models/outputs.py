"""What the models return, and the name under which transformers gives and takes a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from million_experts.layers import Routing

from .versions import name_here

__all__ = ["PeerCausalLMOutput", "PeerModelOutput", "named_cache"]

# transformers calls keys and values of earlier tokens `cache` from 5.24 on, `past_key_values` before.
_CACHE = name_here(BaseModelOutputWithPast, "cache", "past_key_values")


def named_cache(cache: Cache | None) -> dict[str, Any]:
    """The cache as an argument of transformers' own functions, modules and outputs."""
    return {_CACHE: cache}


@dataclass
class PeerModelOutput(BaseModelOutputWithPast):
    """What `PeerModel` returns.

    `routing`, if asked for, has one `Routing` for each layer with product keys, in order: its `indices`,
    `gates` and `scores` are [batch, sequence, heads, experts per head]. `router_loss` is the sum of the
    routers' own losses, in training alone and where a layer has one. `router_logits`, if asked for, has
    the logits [batch * sequence, experts] of each router with such a loss, padding included.
    """

    routing: tuple[Routing, ...] | None = None
    router_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class PeerCausalLMOutput(CausalLMOutputWithPast):
    """What `PeerForCausalLM` returns; `routing` and what is the routers' as in `PeerModelOutput`.

    In training `loss` contains `router_loss`.
    """

    routing: tuple[Routing, ...] | None = None
    router_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


if _CACHE != "cache":  # the name that code for every version may read
    output: Any
    for output in (PeerModelOutput, PeerCausalLMOutput):
        output.cache = property(lambda self: self.past_key_values)
