"""The parts of the decoder: rotary embeddings, and a block of attention and a feed-forward."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from .configuration import PeerConfig
from .feed_forwards import FEED_FORWARDS, build_feed_forward
from .initialisation import leave_initialisation_to

__all__ = ["PeerDecoderLayer", "PeerRotaryEmbedding"]


class PeerRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, whose frequencies stay float32 when the model is cast.

    In bfloat16 a frequency is off by up to 1 part in 512: by 4 radians at position 2048.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> PeerRotaryEmbedding:
        before = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        for name, old in zip(("inv_freq", "original_inv_freq"), before, strict=True):
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class PeerDecoderLayer(GradientCheckpointingLayer):
    """One block: attention and a feed-forward of the configured kind, each with a norm before it."""

    def __init__(self, config: PeerConfig, layer_idx: int) -> None:
        super().__init__()
        kind = cast("list[str]", config.mlp_layer_types)[layer_idx]
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)  # type: ignore[arg-type]
        feed_forward: Any = build_feed_forward(kind, config.hidden_size, getattr(config, kind))
        self.mlp, spec = feed_forward, FEED_FORWARDS[kind]
        self.mlp_takes_mask, self.mlp_is_routed = spec.takes_mask, spec.is_routed
        self.mlp_has_router_loss = spec.has_router_loss
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        # Keeps the sum of 2L residual updates as large as one.
        scale = (2 * config.num_hidden_layers) ** -0.5
        self.self_attn.o_proj.initializer_std = config.initializer_range * scale
        feed_forward.initializer_scales = {spec.output: scale} if spec.output else {}
        leave_initialisation_to(feed_forward)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        output_routing: bool = False,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """The block's output [batch, sequence, D]. `kwargs` go to the attention, the cache among them.

        If `output_routing` and the feed-forward is routed: (output, indices, gates, scores). They are not
        packed into a `Routing` here, since reentrant checkpointing sees no gradient in nested tuples. If its
        router has a loss, in training or if `output_router_logits`: (output, loss, logits).
        """
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        masked = {"mask": token_mask} if self.mlp_takes_mask else {}
        if self.mlp_has_router_loss and (self.training or output_router_logits):
            asked = {"return_router_loss": True, "return_router_logits": True}
            update, *rest = self.mlp(normed, **masked, **asked)
            return hidden_states + update, *rest
        if self.mlp_is_routed and output_routing:
            update, routing = self.mlp(normed, **masked, return_routing=True)
            return hidden_states + update, *routing
        return hidden_states + self.mlp(normed, **masked)
