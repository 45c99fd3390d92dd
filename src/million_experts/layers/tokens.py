"""What every layer with a mask does with its input: check it, flatten it, and blank the masked tokens."""

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor

from million_experts.ops.checks import check_tensors


def flatten_tokens(x: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """Tokens x [..., D] as [T, D], those outside `mask` [...] replaced by zeros, and the mask as [T].

    By `where`, not by a product: what masked tokens hold, NaN included, reaches neither output nor gradient.

    Raises:
        TypeError: no tensor.
        ValueError: a last dimension other than `dim`; a mask of another shape or dtype.
    """
    check_tensors(x=x, mask=mask)
    if x.dim() < 1 or x.shape[-1] != dim:
        raise ValueError(f"x must have shape [..., {dim}], got {list(x.shape)}")
    tokens = x.reshape(-1, dim)
    if mask is None:
        return tokens, None
    if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of shape {list(x.shape[:-1])}, x's without its last dimension, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    mask = mask.reshape(-1)
    return torch.where(mask[:, None], tokens, 0), mask


def blank_masked(y: Tensor, mask: Tensor | None) -> Tensor:
    """y [T, D] with zeros for masked tokens, whose gradient is zero then, too."""
    return y if mask is None else torch.where(mask[:, None], y, 0)


def has_readable_values(tensor: Tensor) -> bool:
    """Whether a branch may ask for a tensor's values.

    Not while a graph is traced, nor where there are none: on the meta device, in a fake tensor, and for the
    single element that `torch.func.vmap` shows of a batch.
    """
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return not isinstance(tensor, FakeTensor)
