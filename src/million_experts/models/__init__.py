"""A decoder with PEER layers in transformers' own form, known to its Auto classes.

Needs transformers (`pip install "million-experts[train]"`), of a version in `versions.SUPPORTED`, but imports
it only when a name is used: `million_experts.models.registration` has to be importable without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .versions import check_transformers

if TYPE_CHECKING:
    from .configuration import PeerConfig
    from .counting import MemoryEstimate, ParameterCount, count_parameters, memory_estimate
    from .feed_forwards import FEED_FORWARDS, FeedForwardKind
    from .modeling import (
        PeerCausalLMOutput,
        PeerForCausalLM,
        PeerModel,
        PeerModelOutput,
        PeerPreTrainedModel,
    )

__all__ = [
    "FEED_FORWARDS",
    "FeedForwardKind",
    "MemoryEstimate",
    "ParameterCount",
    "PeerCausalLMOutput",
    "PeerConfig",
    "PeerForCausalLM",
    "PeerModel",
    "PeerModelOutput",
    "PeerPreTrainedModel",
    "count_parameters",
    "memory_estimate",
]

_HOME = {
    "PeerConfig": "configuration",
    "FEED_FORWARDS": "feed_forwards",
    "FeedForwardKind": "feed_forwards",
    "MemoryEstimate": "counting",
    "ParameterCount": "counting",
    "count_parameters": "counting",
    "memory_estimate": "counting",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME.get(name, "modeling")
    try:
        check_transformers()
        module = importlib.import_module(f".{home}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("transformers", "huggingface_hub"):
            raise
        raise ImportError(
            f'{__name__}.{name} needs transformers: pip install "million-experts[train]"'
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
