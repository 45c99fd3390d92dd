"""Training FLOPs per token of a `PeerConfig`, by block and by part, counted from its sizes alone.

The convention, that of scaling-law papers:

- A multiply-add is 2 FLOPs. Counted are matrix products, and the additions that make sums of sub-key scores.
  Not counted are norms, activations, softmaxes, gates, top-k, rotary embeddings and residual sums, whose
  cost grows with the width, not with its square.
- The backward pass costs twice the forward pass, in every part. (For sub-keys that is more than our kernels
  do: only the selected ones get a gradient.)
- Looking up an embedding or a row of a table costs nothing; what is computed with the row counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from million_experts.layers.dense import default_width
from million_experts.layers.retrieval import factorise

if TYPE_CHECKING:
    from million_experts.models import PeerConfig

__all__ = ["FlopCount", "training_flops_per_token"]

MULTIPLY_ADD = 2
TRAINING = 3  # the forward pass, and twice as much backward


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one training step per token: forward and backward.

    Attributes:
        blocks: for each block its parts by name: "attention projections", "attention scores", then of the
            feed-forward those that it has of "feed-forward" (PEER's shared branch, too), "router",
            "query projection", "sub-key scores", "pair sums", "experts", "values", "gate and output".
        head: the output layer.
    """

    blocks: tuple[Mapping[str, float], ...]
    head: float

    @property
    def total(self) -> float:
        """FLOPs per token of the whole model."""
        return sum(self.parts.values())

    @property
    def forward(self) -> float:
        """FLOPs per token of the forward pass alone."""
        return self.total / TRAINING

    @property
    def parts(self) -> dict[str, float]:
        """FLOPs per token by part, the blocks taken together, and the head."""
        parts: dict[str, float] = {}
        for block in self.blocks:
            for name, flops in block.items():
                parts[name] = parts.get(name, 0) + flops
        return {**parts, "head": self.head}


def training_flops_per_token(config: PeerConfig, context: int, causal: bool = True) -> FlopCount:
    """Training FLOPs per token of a `PeerForCausalLM` on sequences of `context` tokens.

    Args:
        config: the model's configuration. All blocks and kinds of feed-forward are counted.
        context: tokens a sequence; a query meets that many keys, or with `causal` half of them on average.
        causal: whether attention skips the keys that a query must not see: (context + 1) / 2 keys a query.
            False counts all `context`, as papers often do and as a kernel that masks afterwards works.

    Raises:
        ValueError: a context that is not positive.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}")
    keys = (context + 1) / 2 if causal else context
    kinds: Any = config.mlp_layer_types
    each = MULTIPLY_ADD * TRAINING
    blocks = [{**_attention(config, keys), **_feed_forward(config, kind)} for kind in kinds]
    return FlopCount(
        blocks=tuple({part: each * number for part, number in block.items()} for block in blocks),
        head=each * config.hidden_size * config.vocab_size,
    )


def _attention(config: Any, keys: float) -> dict[str, float]:
    """Multiply-adds per token."""
    queries = config.num_attention_heads * config.head_dim
    others = config.num_key_value_heads * config.head_dim  # keys, and as many values
    return {
        "attention projections": config.hidden_size * (2 * queries + 2 * others),  # query, key, value, output
        "attention scores": 2 * keys * queries,  # queries with keys, weights with values
    }


def _feed_forward(config: Any, kind: str) -> dict[str, float]:
    """Multiply-adds per token; a single addition is half of one."""
    dim, arguments = config.hidden_size, getattr(config, kind)
    return {
        "dense": _dense,
        "swiglu": _dense,
        "moe": _moe,
        "expert_choice": _moe,
        "peer": _peer,
        "pkm": _memory,
        "memory_plus": _memory_plus,
    }[kind](dim, arguments)


def _dense(dim: int, arguments: Mapping[str, Any]) -> dict[str, float]:
    return {"feed-forward": _full_size(dim, arguments["width"], arguments["glu"])}


def _full_size(dim: int, width: int | None, glu: bool) -> int:
    width = default_width(dim, glu) if width is None else width
    return dim * width * (3 if glu else 2)


def _moe(dim: int, arguments: Mapping[str, Any]) -> dict[str, float]:
    """k experts a token, or `capacity_factor` of them on average; its rounding up is not counted."""
    experts = arguments.get("experts_per_token", arguments.get("capacity_factor"))
    return {
        "router": dim * arguments["num_experts"],
        "experts": experts * _full_size(dim, arguments["width"], arguments["glu"]),
    }


def _retrieval(dim: int, arguments: Mapping[str, Any]) -> dict[str, float]:
    heads, k, key_dim = (arguments[name] for name in ("num_heads", "experts_per_head", "key_dim"))
    return {
        "query projection": dim * heads * key_dim,
        "sub-key scores": heads * sum(factorise(arguments["num_experts"])) * key_dim / 2,
        "pair sums": heads * k**2 / 2,  # additions
    }


def _peer(dim: int, arguments: Mapping[str, Any]) -> dict[str, float]:
    experts = arguments["num_heads"] * arguments["experts_per_head"]
    parts = {**_retrieval(dim, arguments), "experts": _full_size(dim, experts, arguments["glu"])}
    if arguments["shared_width"]:
        parts["feed-forward"] = _full_size(dim, arguments["shared_width"], arguments["glu"])
    return parts


def _memory(dim: int, arguments: Mapping[str, Any]) -> dict[str, float]:
    values = arguments["num_heads"] * arguments["experts_per_head"]
    return {**_retrieval(dim, arguments), "values": dim * values}


def _memory_plus(dim: int, arguments: Mapping[str, Any]) -> dict[str, float]:
    return {**_memory(dim, arguments), "gate and output": 2 * dim**2}
