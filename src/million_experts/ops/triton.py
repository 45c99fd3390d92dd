"""The operations by Triton kernels, for GPUs that CUDA or ROCm reaches; `docs/kernels.md` explains them.

Shapes as in `reference`. What the kernels do not take, float64 above all, goes to it on the same device.
"""

from million_experts.ops.reference import masked_batch_norm, masked_batch_norm_backward
from million_experts.ops.triton_experts import expert_mlp, expert_mlp_backward, expert_mlp_backward_touched
from million_experts.ops.triton_retrieval import product_key_topk, product_key_topk_backward
from million_experts.ops.triton_rowwise import rowwise_adamw

__all__ = [
    "expert_mlp",
    "expert_mlp_backward",
    "expert_mlp_backward_touched",
    "masked_batch_norm",
    "masked_batch_norm_backward",
    "product_key_topk",
    "product_key_topk_backward",
    "rowwise_adamw",
]
