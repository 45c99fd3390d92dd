"""Batch normalisation whose statistics leave padded tokens out."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from million_experts._typing import Bool, Float
from million_experts.layers.tokens import has_readable_values
from million_experts.ops import masked_batch_norm
from million_experts.ops.statistics import move_statistics


def several_ranks(group: "dist.ProcessGroup | None" = None) -> bool:
    """Whether this process trains together with others: those of a group, by default all."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class MaskedBatchNorm(_BatchNorm):
    """BatchNorm over tokens [T, C], with an optional mask of the real ones.

    Statistics are computed and kept in float32 or wider, `.to(torch.bfloat16)` included. Parameters, buffers
    and the meaning of `momentum` are those of `torch.nn.BatchNorm1d`: with None the running statistics are
    the means over all batches. Tools that look for BatchNorm find it, such as
    `torch.optim.swa_utils.update_bn`. `SyncBatchNorm.convert_sync_batchnorm` does not replace the query norm
    of a layer, but synchronises it.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__(num_features, eps, momentum)
        for name in ("running_mean", "running_var"):  # whatever the default dtype
            setattr(self, name, getattr(self, name).to(torch.float32))
        self.synchronised = False
        self._group: dist.ProcessGroup | None = None

    def synchronise(self, group: "dist.ProcessGroup | None" = None) -> None:
        """From now on statistics are those of the real tokens of all ranks, or of a group of them.

        Needs `torch.distributed` to be initialised, and every rank to run the module equally often in
        training, with whatever number of tokens, none included. Without several ranks nothing changes.
        """
        self.synchronised, self._group = True, group

    @property
    def over_ranks(self) -> bool:
        """Whether statistics are taken over several ranks here and now."""
        return self.synchronised and several_ranks(self._group)

    def _apply(self, fn, recurse=True):
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        for name, old in zip(("running_mean", "running_var"), before, strict=True):
            new = getattr(self, name)
            if old is not None and new.dtype in (torch.float16, torch.bfloat16):
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
        statistics move once per forward pass: not again when gradient checkpointing repeats it. A module
        whose running statistics are None, as torch's tools leave it, normalises by the batch in eval, too.

        Raises:
            ValueError: fewer than two real tokens in training (none at all in an empty batch is fine); of all
                ranks together where they are synchronised. Of several ranks that are not, one may have none.
        """
        by_batch = self.training or self.running_mean is None
        if by_batch and self.over_ranks:
            return self._forward_over_ranks(x, mask)
        count = self._count(mask, x) if by_batch and x.shape[0] > 0 else 0
        if isinstance(count, Tensor) or count > 0:
            y, mean, variance = masked_batch_norm(x, mask, self.weight, self.bias, self.eps, backend)
            self._update(mean, variance, count)
            return y
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.running_mean is None or self.running_var is None:
            return self._normalise(x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]))
        return self._normalise(
            x if mask is None else torch.where(mask[:, None], x, 0),
            self.running_mean.to(x.dtype),
            self.running_var.to(x.dtype),
        )

    def _normalise(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        scale = torch.rsqrt(variance + self.eps) * self.weight.to(x.dtype)
        return (x - mean) * scale + self.bias.to(x.dtype)

    def _forward_over_ranks(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        real = torch.ones(len(x), dtype=torch.bool, device=x.device) if mask is None else mask
        # The count travels with the sums: exact, whatever their dtype.
        count = real.sum().to(torch.float64)
        sums = torch.where(real[:, None], x, 0).sum(0, dtype=torch.float64)
        totals = self._sum_over_ranks(torch.cat([sums, count[None]]))
        count = totals[-1].detach()
        if has_readable_values(count) and count < 2:
            raise ValueError(
                f"{_TOO_FEW}, of all ranks together, got {int(count)}; eval mode or query_norm='layer' take "
                "any number"
            )
        mean = (totals[:-1] / count).to(x.dtype)
        squares = torch.where(real[:, None], x - mean, 0).square().sum(0, dtype=torch.float64)
        variance = (self._sum_over_ranks(squares) / count).to(x.dtype)
        self._update(mean, variance, count)
        return self._normalise(x, mean, variance)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, through which gradients flow: a rank's tokens move the statistics of all."""
        total: Tensor = _SumOverRanks.apply(tensor, self._group)
        return total

    def _count(self, mask: Tensor | None, x: Tensor) -> Tensor | int:
        """How many tokens are real; raises where they are too few for statistics.

        Of several ranks one may have none: the others would wait for it.
        """
        if mask is not None and not has_readable_values(mask):
            real = mask.sum()
            if torch.compiler.is_compiling():  # a branch on data would break the graph
                enough = (real > 1) | (real == 0) if several_ranks() else real > 1
                torch._assert_async(enough, _TOO_FEW)
            return real
        count = x.shape[0] if mask is None else int(mask.sum())
        if count < 2 and not (count == 0 and several_ranks()):
            raise ValueError(
                f"{_TOO_FEW}, got {count} of {x.shape[0]}; eval mode or query_norm='layer' take any number"
            )
        return count

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        any_real = None
        if isinstance(count, Tensor):
            if several_ranks() and not self.over_ranks:
                any_real = count > 0
            count = count.to(var.dtype)  # a quotient of integers would be float32
        unbiased = var * (count / (count - 1))
        move_statistics(
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            mean.detach(),
            unbiased.detach(),
            self.momentum,
            any_real,
        )


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm in float32 or wider, whatever the dtypes of tokens and weights."""

    def forward(self, input: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        weight, bias = (t if t is None else t.to(x.dtype) for t in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(context, tensor: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
        context.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(context, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=context.group)
        return total, None


_TOO_FEW = "mask must leave at least two real tokens for BatchNorm in training"
