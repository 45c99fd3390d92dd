"""The kinds of feed-forward layer that a decoder can hold, and how their arguments are checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from million_experts._arguments import did_you_mean
from million_experts.layers import (
    PEER,
    DenseFeedForward,
    ExpertChoiceMoE,
    MemoryPlus,
    ProductKeyMemory,
    TokenChoiceMoE,
)

__all__ = ["FEED_FORWARDS", "FeedForwardKind", "build_feed_forward", "complete_arguments"]

# Set by the model (`dim`) or by the context in which it is built, never by a configuration.
_NOT_CONFIGURED = {"self", "dim", "device", "dtype"}


@dataclass(frozen=True)
class FeedForwardKind:
    """One kind of feed-forward: its class, and what a model does with it.

    `layer(dim, **arguments)` builds it, with `defaults` for what it sets unless told otherwise. A model gives
    it the mask of the real tokens, asks for its routing, or for a loss of its router, where its `forward`
    has a parameter for that.

    `output` names the parameter that writes into the residual stream and is drawn smaller in a deep model;
    None where the layer's own derivation or paper says how large its output is.
    """

    layer: type[nn.Module]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    output: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument that a configuration may set, with its default."""
        parameters = inspect.signature(self.layer).parameters.values()
        own = {p.name: p.default for p in parameters if p.name not in _NOT_CONFIGURED}
        return {**own, **self.defaults}

    @property
    def takes_mask(self) -> bool:
        """Whether tokens have to be told from padding."""
        return self._takes("mask")

    @property
    def is_routed(self) -> bool:
        """Whether the layer retrieves by product keys and can return its `Routing`."""
        return self._takes("return_routing")

    @property
    def has_router_loss(self) -> bool:
        """Whether the layer has a loss that training adds to the model's."""
        return self._takes("return_router_loss")

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(self.layer.forward).parameters


# A new kind needs an entry here and a field of the same name in PeerConfig.
FEED_FORWARDS: dict[str, FeedForwardKind] = {
    "dense": FeedForwardKind(DenseFeedForward, output="up.weight"),
    # A kind of its own, so that blocks of both stand in one model.
    "swiglu": FeedForwardKind(DenseFeedForward, {"activation": "silu", "glu": True}, output="up.weight"),
    "peer": FeedForwardKind(PEER),
    "moe": FeedForwardKind(TokenChoiceMoE, output="up"),
    "expert_choice": FeedForwardKind(ExpertChoiceMoE, output="up"),
    "pkm": FeedForwardKind(ProductKeyMemory),
    "memory_plus": FeedForwardKind(MemoryPlus, output="out_proj.weight"),
}


def complete_arguments(kind: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a kind of layer: those given, and the defaults of the others.

    All are written out so that a stored configuration keeps its meaning when a default changes.
    Lists become tuples: JSON knows no tuples, and `num_experts=(64, 32)` has to come back the same.

    Raises:
        ValueError: if an argument does not exist; the message names the ones that do, and the closest.
            If it is text where a number or a switch stands; the layers check the rest.
    """
    if not isinstance(given, Mapping | None):
        raise ValueError(f"{kind} must be a dict of the layer's arguments, got {given!r}")
    allowed = FEED_FORWARDS[kind].arguments
    given = dict(given or {})
    for name in given:
        if name not in allowed:
            raise ValueError(
                f"{kind}: {FEED_FORWARDS[kind].layer.__name__} has no argument {name!r}"
                f"{did_you_mean(name, allowed)}; allowed: {', '.join(sorted(allowed))}"
            )
        _check_type(kind, name, given[name], allowed[name])
    return {name: _tuples(value) for name, value in {**allowed, **given}.items()}


def _check_type(kind: str, name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"{kind}: {name} must be true or false, got {value!r}")
    if isinstance(default, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{kind}: {name} must be a number, got {value!r}")


def build_feed_forward(kind: str, dim: int, arguments: Mapping[str, Any]) -> nn.Module:
    """A feed-forward of the given kind for tokens of width `dim`."""
    return FEED_FORWARDS[kind].layer(dim, **complete_arguments(kind, arguments))


def check_feed_forward(kind: str, dim: int, arguments: Mapping[str, Any]) -> None:
    """Raise the layer's own errors about its arguments' values, without allocating its parameters.

    The backend is left out: a configuration may be read on a machine that cannot run it.
    """
    arguments = {name: value for name, value in arguments.items() if name != "backend"}
    try:
        with unset_fake_temporarily(), torch.device("meta"):
            build_feed_forward(kind, dim, arguments)
    except (TypeError, RuntimeError, OverflowError) as error:  # torch's own: a tensor that no memory can hold
        raise ValueError(f"{kind}: no such layer can be built: {str(error).partition(chr(10))[0]}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
