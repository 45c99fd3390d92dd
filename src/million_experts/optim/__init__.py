"""Training expert tables: an optimiser whose step costs the rows touched, parameter groups, clipping."""

from million_experts.optim.clip import clip_grad_norm_
from million_experts.optim.groups import parameter_groups
from million_experts.optim.rowwise import RowwiseAdamW

__all__ = ["RowwiseAdamW", "clip_grad_norm_", "parameter_groups"]
