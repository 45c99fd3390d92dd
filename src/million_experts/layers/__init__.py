"""Layers: PEER, the retrieval it stands on, and the dense feed-forward it is compared with."""

from million_experts.layers.dense import DenseFeedForward
from million_experts.layers.norm import MaskedBatchNorm
from million_experts.layers.peer import PEER
from million_experts.layers.retrieval import ProductKeyRetrieval, Routing
from million_experts.layers.usage import ExpertUsage, UsageFigures

__all__ = [
    "PEER",
    "DenseFeedForward",
    "ExpertUsage",
    "MaskedBatchNorm",
    "ProductKeyRetrieval",
    "Routing",
    "UsageFigures",
]
