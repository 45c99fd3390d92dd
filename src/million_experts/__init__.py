"""Layers with a million tiny experts: PEER (arXiv 2407.04153) for PyTorch and transformers."""

from million_experts.layers import PEER, ExpertUsage, Routing
from million_experts.models.registration import register_when_transformers_is_imported

__version__ = "0.1.0"

__all__ = ["PEER", "ExpertUsage", "Routing", "__version__"]

register_when_transformers_is_imported()
