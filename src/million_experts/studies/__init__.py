"""Studies: what is needed to compare PEER with its competitors at equal cost."""

from million_experts.studies.flops import FlopCount, training_flops_per_token

__all__ = ["FlopCount", "training_flops_per_token"]
