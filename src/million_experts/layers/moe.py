"""Mixtures of full-size experts, which PEER is compared with: tokens choose experts, or experts tokens.

Shapes: T tokens, D model width, E experts, W neurons an expert, k experts a token, C tokens an expert.
"""

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from million_experts._arguments import check_choice, check_positive
from million_experts._typing import Bool, Float, Int
from million_experts.layers.dense import default_width
from million_experts.layers.tokens import flatten_tokens
from million_experts.ops import ACTIVATIONS
from million_experts.ops.reference import activate

CHOICES = ("token", "expert")


class MixtureOfExperts(nn.Module):
    """A linear router and E experts, each of them a `DenseFeedForward`: what both kinds of choice share.

    `down` [E, W, D] maps tokens to neurons, `up` [E, D, W] maps back, `gate` [E, W, D] is there with GLU: the
    paper's words, Llama's the other way round. All weights are drawn from N(0, 1 / inputs) as those of
    `DenseFeedForward` are, the router's too, so that its logits have unit variance: the papers are silent.
    """

    def __init__(self, dim: int, num_experts: int, width: int | None, activation: str, glu: bool) -> None:
        super().__init__()
        check_positive(dim=dim, num_experts=num_experts)
        width = default_width(dim, glu) if width is None else width
        check_positive(width=width)
        check_choice("activation", activation, ACTIVATIONS)
        self.dim, self.num_experts, self.width = dim, num_experts, width
        self.activation, self.glu = activation, glu
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.down = nn.Parameter(torch.empty(num_experts, width, dim))
        self.gate = nn.Parameter(torch.empty(num_experts, width, dim)) if glu else None
        self.up = nn.Parameter(torch.empty(num_experts, dim, width))
        if not self.down.is_meta:
            self.reset_parameters()

    @property
    def active_experts(self) -> float:
        """How many experts work on a token, on average."""
        raise NotImplementedError

    @property
    def expert_weights(self) -> list[nn.Parameter]:
        """The parameters whose first dimension counts experts."""
        return [w for w in (self.down, self.gate, self.up) if w is not None]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for weight in (self.router.weight, *self.expert_weights):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def _logits(self, x_TD: Tensor) -> Tensor:
        """[T, E] in float32 or wider: their softmax is not to be taken in bfloat16."""
        logits = self.router(x_TD)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _mix(
        self, x_TD: Tensor, chosen_TK: Int[Tensor, "T k"], gates_TK: Tensor, mask_T: Tensor | None
    ) -> Tensor:
        """[T, D]: the gated sum of each token's experts; tokens are sorted, one matrix product an expert."""
        k = chosen_TK.shape[1]
        expert_P = chosen_TK.flatten()
        if mask_T is not None:  # pairs of masked tokens go to an expert that does not exist
            expert_P = torch.where(mask_T.repeat_interleave(k), expert_P, self.num_experts)
        counts = torch.bincount(expert_P, minlength=self.num_experts)[: self.num_experts].tolist()
        pairs_P = expert_P.argsort(stable=True)[: sum(counts)]
        tokens_P = pairs_P // k
        # Unbound at once, the experts' gradients are stacked once, instead of a whole tensor for each expert.
        weights = [w.unbind(0) for w in self.expert_weights]
        parts = [
            self._expert(x_ND, *(w[expert] for w in weights))
            for expert, x_ND in enumerate(x_TD[tokens_P].split(counts))
            if len(x_ND) > 0
        ]
        # Without a real token one expert computes nothing: of several ranks each has to reach all parameters.
        out_PD = torch.cat(parts) if parts else self._expert(x_TD[:0], *(w[0] for w in weights))
        out_PD = out_PD * gates_TK.flatten()[pairs_P, None].to(out_PD.dtype)
        return out_PD.new_zeros(x_TD.shape).index_add(0, tokens_P, out_PD)

    def _expert(self, x: Tensor, down: Tensor, *rest: Tensor) -> Tensor:
        """x [n, D] through one expert, or [E, n, D] through all of them."""
        hidden = activate(self.activation, x @ down.mT)
        if self.glu:
            hidden = hidden * (x @ rest[0].mT)
        return hidden @ rest[-1].mT

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, width={self.width}, "
            f"activation={self.activation!r}, glu={self.glu}"
        )


def balancing_loss(
    logits: Float[Tensor, "T E"], chosen: Int[Tensor, "T k"], mask: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, ""]:
    """E * sum_e f_e P_e over the real tokens; k where experts are used evenly, up to E where they are not.

    f_e is the number of choices of expert e per token and P_e the mean of its softmax probability: Eqs. 4-6
    of Switch Transformers (arXiv 2101.03961), with all k choices counted as Mixtral's code does. The gradient
    flows through P. Without a real token it is 0.
    """
    weights = logits.new_ones(len(logits)) if mask is None else mask.to(logits.dtype)
    count = weights.sum().clamp(min=1)
    frequency = (
        F.one_hot(chosen, logits.shape[-1]).sum(1).to(logits.dtype).mul(weights[:, None]).sum(0) / count
    )
    probability = logits.softmax(-1).mul(weights[:, None]).sum(0) / count
    return logits.shape[-1] * (frequency * probability).sum()


class TokenChoiceMoE(MixtureOfExperts):
    """Each token goes to the k experts with the highest logits: Mixtral (arXiv 2401.04088, section 2.1).

    The gates are the softmax over these k logits, and by default experts are SwiGLU, both as there. No token
    is dropped. The balancing loss (`balancing_loss`) keeps the router from using few experts; it is computed
    for this layer's tokens alone, where Mixtral's code averages all layers' choices first.

    Args:
        dim: D, the width of tokens.
        num_experts: E.
        experts_per_token: k.
        width: W, neurons an expert; by default that of a `DenseFeedForward`.
        activation: "silu", "gelu" or "relu".
        glu: experts multiply the activation by a third, linear map of the token.
        router_loss_coef: what the balancing loss is multiplied by. 0.01 is Switch's choice;
            transformers' Mixtral has 0.001 by default.

    Raises:
        ValueError: an argument outside what is allowed; the message names it.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        experts_per_token: int = 2,
        width: int | None = None,
        activation: str = "silu",
        glu: bool = True,
        router_loss_coef: float = 0.01,
    ):
        check_positive(experts_per_token=experts_per_token)
        super().__init__(dim, num_experts, width, activation, glu)
        if experts_per_token > num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts={num_experts}, got {experts_per_token}"
            )
        if not router_loss_coef >= 0:
            raise ValueError(f"router_loss_coef must be at least 0, got {router_loss_coef}")
        self.experts_per_token, self.router_loss_coef = experts_per_token, router_loss_coef

    @property
    def active_experts(self) -> float:
        return self.experts_per_token

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_router_loss: Literal[False] = False,
        return_router_logits: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_router_loss: Literal[True],
        return_router_logits: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_router_loss: bool = False,
        *,
        return_router_logits: Literal[True],
    ) -> tuple[Tensor, ...]: ...
    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        mask: Bool[Tensor, "*batch"] | None = None,
        return_router_loss: bool = False,
        return_router_logits: bool = False,
    ) -> Float[Tensor, "*batch D"] | tuple[Tensor, ...]:
        """Applies the layer to tokens x [..., D].

        Args:
            x: [..., D].
            mask: [...] bool, True for a real token. Masked tokens give zeros, go to no expert, do not count
                in the balancing loss and receive zero gradient, whatever they hold.
            return_router_loss: also return the balancing loss times `router_loss_coef`.
            return_router_logits: also return the router's logits [T, E] of all tokens, masked ones included.

        Returns:
            y [..., D]; or (y, loss), (y, logits) or (y, loss, logits), as asked for.

        Raises:
            ValueError: a last dimension other than `dim`; a mask of another shape or dtype.
        """
        tokens, mask = flatten_tokens(x, mask, self.dim)
        logits = self._logits(tokens)
        best, chosen = logits.topk(self.experts_per_token)
        y = self._mix(tokens, chosen, best.softmax(-1), mask).view(x.shape)
        also: list[Tensor] = []
        if return_router_loss:
            also.append(self.router_loss_coef * balancing_loss(logits, chosen, mask))
        if return_router_logits:
            also.append(logits)
        return (y, *also) if also else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts_per_token={self.experts_per_token}"


class ExpertChoiceMoE(MixtureOfExperts):
    """Each expert takes the C tokens that suit it best: expert choice (arXiv 2202.09368, section 3.2).

    With S [T, E] the softmax of the router's logits over the experts, expert e takes the C tokens with the
    largest S[t, e] and multiplies its output by it; C = ceil(T * capacity_factor / E) of the T real tokens of
    all the sequences of a batch. Every expert is equally busy, so no balancing loss is needed. A token may
    get many experts, or none, and then gives zeros.

    **The choice is not causal.** Whether an expert takes a token depends on the other tokens of the batch,
    later ones of the same text included. In training that tells the model something about what it is to
    predict. Evaluated so, texts look better than they could be predicted, and when text is generated token
    by token there are no others to choose from: every expert would take the one token that is there. So in
    eval mode tokens choose by default: each takes its round(capacity_factor) best experts, as many as in
    training on average, with the same gates. Then a token stands alone, and generating it gives what
    scoring it gives. `eval_choice="expert"` keeps the choice of training within what is passed: that is how
    the baselines of papers are scored, and a comparison should state which was used.

    Args:
        dim: D, the width of tokens.
        num_experts: E; 128 in PEER's paper.
        capacity_factor: how many experts a token gets on average; 2 as in the paper.
        width: W, neurons an expert; by default that of a `DenseFeedForward`.
        activation: "gelu", "relu" or "silu".
        glu: experts multiply the activation by a third, linear map of the token.
        eval_choice: who chooses in eval mode, "token" or "expert".

    Raises:
        ValueError: an argument outside what is allowed; the message names it.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 128,
        capacity_factor: float = 2.0,
        width: int | None = None,
        activation: str = "gelu",
        glu: bool = False,
        eval_choice: str = "token",
    ):
        super().__init__(dim, num_experts, width, activation, glu)
        if not 0 < capacity_factor <= num_experts:
            raise ValueError(
                f"capacity_factor must be positive and at most num_experts={num_experts}, "
                f"got {capacity_factor}"
            )
        check_choice("eval_choice", eval_choice, CHOICES)
        self.capacity_factor, self.eval_choice = capacity_factor, eval_choice

    @property
    def active_experts(self) -> float:
        return self.capacity_factor

    def forward(
        self, x: Float[Tensor, "*batch D"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """Applies the layer to tokens x [..., D]; returns y [..., D].

        `mask` [...] is True for a real token. Masked tokens give zeros, take no expert's capacity and receive
        zero gradient, whatever they hold.

        Raises:
            ValueError: a last dimension other than `dim`; a mask of another shape or dtype.
        """
        tokens, mask = flatten_tokens(x, mask, self.dim)
        scores = self._logits(tokens).softmax(-1)
        if self.training or self.eval_choice == "expert":
            y = self._experts_choose(tokens, scores, mask)
        else:
            gates, chosen = scores.topk(max(1, round(self.capacity_factor)))
            y = self._mix(tokens, chosen, gates, mask)
        return y.view(x.shape)

    def _experts_choose(self, x_TD: Tensor, scores_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        real = len(x_TD) if mask_T is None else int(mask_T.sum())
        capacity = math.ceil(real * self.capacity_factor / self.num_experts)
        if mask_T is not None:
            scores_TE = torch.where(mask_T[:, None], scores_TE, -1)  # below every probability
        gates_EC, chosen_EC = scores_TE.T.topk(capacity)
        out_ECD = self._expert(x_TD[chosen_EC], *self.expert_weights)
        out_ECD = out_ECD * gates_EC[..., None].to(out_ECD.dtype)
        return out_ECD.new_zeros(x_TD.shape).index_add(0, chosen_EC.flatten(), out_ECD.flatten(0, 1))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, capacity_factor={self.capacity_factor}, "
            f"eval_choice={self.eval_choice!r}"
        )
