"""Layers: PEER, the retrieval it stands on, and the layers it is compared with."""

from million_experts.layers.dense import DenseFeedForward
from million_experts.layers.memory import MemoryPlus, ProductKeyMemory
from million_experts.layers.moe import ExpertChoiceMoE, MixtureOfExperts, TokenChoiceMoE
from million_experts.layers.norm import MaskedBatchNorm
from million_experts.layers.peer import PEER
from million_experts.layers.retrieval import ProductKeyRetrieval, Routing
from million_experts.layers.usage import ExpertUsage, UsageFigures

__all__ = [
    "PEER",
    "DenseFeedForward",
    "ExpertChoiceMoE",
    "ExpertUsage",
    "MaskedBatchNorm",
    "MemoryPlus",
    "MixtureOfExperts",
    "ProductKeyMemory",
    "ProductKeyRetrieval",
    "Routing",
    "TokenChoiceMoE",
    "UsageFigures",
]
