"""vLLM's entry point: it calls `register` in each of its processes, so that it serves our models.

vLLM runs them through its transformers backend, which takes any decoder of transformers whose attention can
be replaced. Nothing of vLLM is imported before vLLM itself calls.
"""

from __future__ import annotations

__all__ = ["register"]

_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register the configuration with transformers and the architecture with vLLM; may be called again."""
    from vllm import ModelRegistry

    from million_experts.models import PeerForCausalLM

    ModelRegistry.register_model(PeerForCausalLM.__name__, _BACKEND)
