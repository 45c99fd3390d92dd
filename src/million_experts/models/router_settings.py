"""What other programs ask a configuration about its routers, under Mixtral's names."""

from __future__ import annotations

from typing import Any

from .feed_forwards import check_feed_forward

__all__ = ["RouterSettings"]


class RouterSettings:
    """Mixtral's names for the settings of `"moe"` layers; a configuration without such layers has none.

    TRL's trainers compute the balancing loss themselves: from the routers' logits, by Mixtral's function,
    where a configuration has `output_router_logits`. None of this is stored: config.json has `moe`.
    """

    moe: dict[str, Any] | None
    mlp_layer_types: Any
    hidden_size: int

    def _routers(self, name: str) -> tuple[int, dict[str, Any]]:
        """How many layers have a router that tokens choose by, and these layers' arguments."""
        if self.moe is None or "moe" not in self.mlp_layer_types:
            raise AttributeError(f"{name!r} is a setting of 'moe' layers, and this configuration has none")
        return self.mlp_layer_types.count("moe"), self.moe

    @property
    def num_experts(self) -> int:
        return self._routers("num_experts")[1]["num_experts"]

    @property
    def num_experts_per_tok(self) -> int:
        return self._routers("num_experts_per_tok")[1]["experts_per_token"]

    @property
    def router_aux_loss_coef(self) -> float:
        """The factor of Mixtral's loss: a mean over the layers, where `router_loss_coef` is that of a sum."""
        layers, moe = self._routers("router_aux_loss_coef")
        return layers * moe["router_loss_coef"]

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        layers, moe = self._routers("router_aux_loss_coef")
        if value != self.router_aux_loss_coef:  # else rounding would change what was configured
            moe = {**moe, "router_loss_coef": value / layers}
            check_feed_forward("moe", self.hidden_size, moe)
            self.moe = moe

    @property
    def output_router_logits(self) -> bool:
        """Whether the forward pass returns the routers' logits."""
        self._routers("output_router_logits")
        return self.__dict__.get("output_router_logits", False)

    @output_router_logits.setter
    def output_router_logits(self, value: bool) -> None:
        self._routers("output_router_logits")
        self.__dict__["output_router_logits"] = value

    def to_dict(self) -> dict[str, Any]:
        """What is stored: without `output_router_logits`, which a trainer sets for its own run."""
        stored = super().to_dict()  # type: ignore[misc]
        stored.pop("output_router_logits", None)
        return stored
