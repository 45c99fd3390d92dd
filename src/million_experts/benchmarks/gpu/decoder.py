"""A small decoder of bytes of torch alone, so that no version of anything else can stand in its way.

Shapes: B sequences of S bytes, D model width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inputs, self.output = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.inputs(x_BSD).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    """Attention and a feed-forward of tokens [T, D], each after a norm and beside what it adds to."""

    def __init__(self, dim: int, heads: int, feed_forward: nn.Module):
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads), feed_forward
        self.first_norm, self.second_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.first_norm(x_BSD))
        y_TD = self.feed_forward(self.second_norm(x_BSD).flatten(0, 1))
        return x_BSD + y_TD.view(x_BSD.shape).to(x_BSD.dtype)


class Decoder(nn.Module):
    """Predicts bytes.

    Args:
        dim: D.
        heads: of attention.
        length: bytes that it sees at most.
        feed_forwards: make that of each block.
    """

    def __init__(self, dim: int, heads: int, length: int, feed_forwards: list[Callable[[], nn.Module]]):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, make()) for make in feed_forwards))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False)
        for weight in (self.bytes.weight, self.places.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("attention.output.weight", "feed_forward.up", "feed_forward.up.weight")):
                    weight.mul_((2 * len(feed_forwards)) ** -0.5)  # so that the sum of all keeps its size

    def forward(self, ids_BS: Tensor) -> Tensor:
        """The mean loss of each byte but the first, in nats."""
        x_BSD = self.bytes(ids_BS[:, :-1]) + self.places.weight[: ids_BS.shape[1] - 1]
        logits = self.head(self.norm(self.blocks(x_BSD))).float()
        return F.cross_entropy(logits.flatten(0, 1), ids_BS[:, 1:].flatten())
