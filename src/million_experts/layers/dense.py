"""The dense feed-forward layer that PEER replaces."""

from torch import Tensor, nn

from million_experts._arguments import check_choice, check_positive
from million_experts._typing import Float
from million_experts.ops import ACTIVATIONS
from million_experts.ops.reference import activate


def default_width(dim: int, glu: bool) -> int:
    """Neurons of a full-size feed-forward: as many as make 8 * dim^2 parameters, with GLU or without."""
    return -(-dim * 8 // 3 // 8) * 8 if glu else 4 * dim


class DenseFeedForward(nn.Module):
    """Two linear maps with an activation between them, or three with GLU; no biases.

    `down` maps [.., D] to [.., width] and `up` maps back, PEER's words for an expert's two rows (Llama's
    `up_proj` and `down_proj` are the other way round). `activation="silu", glu=True` is SwiGLU
    (arXiv 2002.05202).

    Args:
        dim: D, the width of tokens.
        width: neurons; 4 * dim by default, with GLU 8/3 * dim (rounded up to a multiple of 8) so that the
            number of parameters stays the same.
        activation: "gelu", "relu" or "silu".
        glu: multiply the activation by a third, linear map of the token.

    Weights are drawn from N(0, 1 / inputs), so activations keep unit variance.
    """

    def __init__(self, dim: int, width: int | None = None, activation: str = "gelu", glu: bool = False):
        super().__init__()
        if width is None:
            width = default_width(dim, glu)
        check_positive(dim=dim, width=width)
        check_choice("activation", activation, ACTIVATIONS)
        self.dim, self.width, self.activation, self.glu = dim, width, activation, glu
        self.down = nn.Linear(dim, width, bias=False)
        self.gate = nn.Linear(dim, width, bias=False) if glu else None
        self.up = nn.Linear(width, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.down, self.gate, self.up):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Applies the layer to tokens x [..., D]; returns [..., D].

        Raises:
            ValueError: a last dimension other than `dim`.
        """
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape [..., {self.dim}], got {list(x.shape)}")
        hidden = activate(self.activation, self.down(x))
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.up(hidden)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, glu={self.glu}"
