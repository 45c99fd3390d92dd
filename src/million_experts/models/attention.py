"""Attention of bfloat16 queries in float32, where that is faster.

On CPUs PyTorch's fused attention takes more than twice as long backward in bfloat16 as in float32; queries,
keys and values are small, so to widen them costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .modeling import PeerForCausalLM

WIDE_ATTENTION = "sdpa_float32"  # a name for `model.set_attn_implementation`


def wide_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward`, computed in float32 whatever the dtypes and autocast."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return output.to(query.dtype), weights


def with_fast_attention(model: PeerForCausalLM, narrow: bool) -> PeerForCausalLM:
    """The model, with the attention that is fastest for its training, in bfloat16 (`narrow`) or float32."""
    if narrow and not torch.accelerator.is_available():
        model.set_attn_implementation(WIDE_ATTENTION)
    return model


AttentionInterface.register(WIDE_ATTENTION, wide_attention)
AttentionMaskInterface.register(WIDE_ATTENTION, sdpa_mask)
