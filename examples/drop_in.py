"""Put PEER where a feed-forward layer stood, in a module of your own."""

import torch
from torch import nn

from million_experts import PEER


class Block(nn.Module):
    """A pre-norm transformer block whose feed-forward chooses 64 of 16,384 neurons for each token."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.experts_norm = nn.LayerNorm(dim)
        self.experts = PEER(dim, num_experts=128**2, num_heads=4, experts_per_head=16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [batch, sequence, dim]; mask [batch, sequence] bool, True where a token is real."""
        normed = self.attention_norm(x)
        attended, _ = self.attention(normed, normed, normed, key_padding_mask=~mask, need_weights=False)
        x = x + attended
        return x + self.experts(self.experts_norm(x), mask=mask)


torch.manual_seed(0)
block = Block(dim=64, heads=4)
x = torch.randn(2, 10, 64)
mask = torch.arange(10) < torch.tensor([[10], [7]])  # the second sequence has 7 tokens and 3 of padding

y = block(x, mask)
y.square().mean().backward()
touched = block.experts.experts.grad.abs().amax((1, 2)) > 0
print(f"output {list(y.shape)}; 17 tokens touched {touched.sum()} of {block.experts.num_experts:,} experts")

block.eval()
_, routing = block.experts(x, mask=mask, return_routing=True)
print(f"the first token's best expert in head 0: number {routing.indices[0, 0, 0, 0]}, "
      f"gate {routing.gates[0, 0, 0, 0]:.3f}")  # fmt: skip
