"""Feed-forwards draw their own weights; transformers draws the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .feed_forwards import FEED_FORWARDS

__all__ = ["initialise_missing", "is_feed_forward", "leave_initialisation_to"]


def is_feed_forward(module: nn.Module) -> bool:
    return isinstance(module, tuple(spec.layer for spec in FEED_FORWARDS.values()))


def leave_initialisation_to(feed_forward: Any) -> None:
    """Keep transformers' initialisation off a feed-forward, which derives its own.

    The layer has drawn its weights already when it was built on a real device. On the meta device it has
    not: it is asked again if a checkpoint lacks some of them (see `initialise_missing`).
    """
    for child in feed_forward.modules():
        child._is_hf_initialized = True
    if any(parameter.is_meta for parameter in feed_forward.parameters()):
        feed_forward._is_hf_initialized = False
    else:
        _scale_output(feed_forward)


@torch.no_grad()
def _scale_output(feed_forward: Any) -> None:
    for name, scale in feed_forward.initializer_scales.items():
        feed_forward.get_parameter(name).mul_(scale)


def initialise_missing(feed_forward: Any) -> None:
    """Draw those tensors of a feed-forward that were not loaded; transformers marks the ones that were."""
    # What is on the meta device has nothing to draw: there are no weights yet, or they stay in a file.
    tensors = [t for t in (*feed_forward.parameters(), *feed_forward.buffers()) if not t.is_meta]
    loaded = [t for t in tensors if getattr(t, "_is_hf_initialized", False)]
    if len(loaded) == len(tensors):
        return
    kept = [t.clone() for t in loaded]
    feed_forward.reset_parameters()
    _scale_output(feed_forward)
    for tensor, value in zip(loaded, kept, strict=True):
        tensor.copy_(value)
