"""Batch normalisation whose statistics leave padded tokens out."""

import torch
from torch import Tensor, nn

from million_experts._typing import Bool, Float
from million_experts.ops import masked_batch_norm


class MaskedBatchNorm(nn.Module):
    """BatchNorm over tokens [T, C], with an optional mask of the real ones.

    Statistics are computed and kept in float32 or wider, `.to(torch.bfloat16)` included. Parameters, buffers
    and the meaning of `momentum` are those of `torch.nn.BatchNorm1d`; it is no subclass, so that
    `SyncBatchNorm.convert_sync_batchnorm` does not replace it by a module without a mask.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.empty(num_features, dtype=torch.float32))
        self.register_buffer("running_var", torch.empty(num_features, dtype=torch.float32))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)
        nn.init.zeros_(self.num_batches_tracked)

    def _apply(self, fn, recurse=True):
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        for name, old in zip(("running_mean", "running_var"), before, strict=True):
            new = getattr(self, name)
            if new.dtype in (torch.float16, torch.bfloat16):
                # Statistics move and change size with the module, but never lose precision.
                setattr(self, name, old.to(new.device) if new.device.type != "meta" else new.float())
        return self

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"

    def forward(
        self, x: Float[Tensor, "T C"], mask: Bool[Tensor, " T"] | None = None, backend: str = "auto"
    ) -> Float[Tensor, "T C"]:
        """Normalises x [T, C] by the statistics of its real tokens (training) or the running ones (eval).

        Returns float32, or float64 where x is float64. `mask` [T] is True where a token is real; what the
        others hold does not matter, and what is returned for them means nothing. In training the running
        statistics are updated once a step: not again when gradient checkpointing repeats a forward pass
        during backward.

        Raises:
            ValueError: fewer than two real tokens in training (none at all in an empty batch is fine).
        """
        if self.training and x.shape[0] > 0:
            count = self._count(mask, x)
            y, mean, variance = masked_batch_norm(x, mask, self.weight, self.bias, self.eps, backend)
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
                self._update(mean, variance, count)
            return y
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        scale = torch.rsqrt(variance + self.eps) * self.weight.to(x.dtype)
        return (x - mean) * scale + self.bias.to(x.dtype)

    def _count(self, mask: Tensor | None, x: Tensor) -> Tensor | int:
        """How many tokens are real; raises where they are too few for statistics."""
        if mask is None:
            count: Tensor | int = x.shape[0]
        elif torch.compiler.is_compiling():
            count = mask.sum()
            torch._assert_async(count > 1, _TOO_FEW)  # a branch on data would break the graph
            return count
        else:
            count = int(mask.sum())
        if count < 2:
            raise ValueError(
                f"{_TOO_FEW}, got {count} of {x.shape[0]}; eval mode or query_norm='layer' take any number"
            )
        return count

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
        if isinstance(count, Tensor):
            count = count.to(var.dtype)  # a quotient of integers would be float32
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


_TOO_FEW = "mask must leave at least two real tokens for BatchNorm in training"
