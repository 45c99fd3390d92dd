"""How evenly a layer uses its experts, as the paper measures it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from million_experts.layers.retrieval import ProductKeyRetrieval, Routing
from million_experts.ops.statistics import repeats_a_forward_pass


@dataclass(frozen=True)
class UsageFigures:
    """Figures of one distribution of gate mass over N experts.

    Attributes:
        usage: share of the experts that received any mass, in [0, 1].
        unevenness: KL divergence from the uniform distribution in nats, log N + sum z log z.
        top_share: the largest share that one expert received.
    """

    usage: float
    unevenness: float
    top_share: float


class ExpertUsage:
    """Gate mass that each expert of a layer receives, by head, summed over tokens.

    z_i, an expert's share of all the mass, and the figures made of it are those of Table 2 of arXiv
    2407.04153. Attach it to a layer, run text through the model, read the figures:

        with ExpertUsage(layer) as usage:
            model(input_ids)
        usage.figures()
    """

    def __init__(self, layer: ProductKeyRetrieval):
        self.layer = layer
        self.mass = torch.zeros(layer.num_heads, layer.num_experts, dtype=torch.float64)
        self.tokens = 0
        self._handle = layer.register_routing_hook(self._add)

    def _add(self, layer: ProductKeyRetrieval, routing: Routing) -> None:
        if repeats_a_forward_pass():
            return
        with torch.no_grad():
            gates = routing.gates.detach().to("cpu", torch.float64)
            self.tokens += int((gates.flatten(1) != 0).any(1).sum())
            heads = range(layer.num_heads)
            for head, index, gate in zip(
                heads, routing.indices.cpu().unbind(1), gates.unbind(1), strict=True
            ):
                self.mass[head].index_add_(0, index.flatten(), gate.flatten())

    def close(self) -> None:
        """Stops listening to the layer; the mass stays."""
        self._handle.remove()

    def __enter__(self) -> "ExpertUsage":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def shares(self, head: int | None = None) -> Tensor:
        """z [N], float64, summing to 1: of all heads together, or of one head.

        Raises:
            ValueError: no real token has passed through the layer, or one that is not finite has.
        """
        mass = self.mass.sum(0) if head is None else self.mass[head]
        total = mass.sum()
        if not total.isfinite():
            raise ValueError("the gate mass is not finite: the layer has met tokens with NaN or infinity")
        if not total > 0:
            raise ValueError("no expert has received any gate mass: run text through the layer first")
        return mass / total

    def figures(self, head: int | None = None) -> UsageFigures:
        """Usage, unevenness and top share of all heads together, or of one head."""
        shares = self.shares(head)
        kl = math.log(len(shares)) + torch.special.xlogy(shares, shares).sum()
        return UsageFigures((shares > 0).double().mean().item(), kl.item(), shares.max().item())
