"""What the operations ask of their arguments.

Checked where a user calls them, and again where PyTorch does: kernels get addresses, and everybody can call
`torch.ops.million_experts`.
"""

import torch
from torch import Tensor

from million_experts._arguments import check_choice
from million_experts.ops.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of products of x; on the meta device there is none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def check_tensors(**arguments: object) -> None:
    """Raises TypeError that names the first argument that is no tensor; a mask may be None."""
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor) and not (argument is None and name == "mask"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(argument).__name__}")


def check_floating(**tensors: Tensor) -> None:
    """Raises ValueError that names the first tensor whose dtype no operation takes."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(
                f"{name} must have a floating-point dtype, got {tensor.dtype}; allowed: {allowed}"
            )


def check_accumulated(dtype: torch.dtype, **tensors: Tensor) -> None:
    """Raises ValueError that names the first tensor that forward gave in another dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, as the forward pass gave it, got {tensor.dtype}")


def check_devices(**tensors: Tensor | None) -> None:
    """Raises ValueError that names the first tensor that is not on the device of the first of all.

    An address on another device means nothing to a kernel, and a tensor on "meta" has none.
    """
    (first, tensor), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {tensor.device}, got one on {other.device}"
            )


def check_stored(**arguments: object) -> None:
    """Raises ValueError that names the first sparse tensor, BufferError for one larger than its storage.

    Storage can shrink under a tensor: FSDP frees a parameter's between its uses. Whoever reads it then, reads
    memory that is not the tensor's.
    """
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {tensor.layout}")
        if tensor.numel() == 0:
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
        stored = tensor.untyped_storage().nbytes()
        if stored < needed:
            raise BufferError(
                f"{name} must lie in memory whole: it needs {needed} bytes, its storage has {stored}"
            )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has the shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_mask(mask: Tensor | None, tokens: int) -> None:
    """Raises ValueError unless the mask is None or bool [tokens]."""
    if mask is not None and (mask.shape != (tokens,) or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool of shape [{tokens}] to fit x, got {mask.dtype} {list(mask.shape)}"
        )


def check_range(name: str, indices: Tensor, count: int, of: str) -> None:
    """Raises ValueError unless the indices are int64, IndexError unless they lie in [0, count)."""
    if indices.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {indices.dtype}")
    if indices.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < 0 or high >= count:
        raise IndexError(f"{name} must lie in [0, {count}), {of}, got values from {low} to {high}")


def check_codebooks(query: Tensor, keys1: Tensor, keys2: Tensor, k: int) -> None:
    """The arguments of `product_key_topk`."""
    check_tensors(query=query, keys1=keys1, keys2=keys2)
    if query.dim() != 4 or query.shape[2] != 2:
        raise ValueError(f"query must have shape [T, H, 2, d], got {list(query.shape)}")
    check_floating(query=query, keys1=keys1, keys2=keys2)
    check_devices(query=query, keys1=keys1, keys2=keys2)
    heads, width = query.shape[1], query.shape[3]
    for name, keys in (("keys1", keys1), ("keys2", keys2)):
        if keys.dim() not in (2, 3) or keys.shape[-1] != width or keys.shape[:-2] not in ((), (heads,)):
            raise ValueError(
                f"{name} must have shape [n, {width}] or [{heads}, n, {width}] to fit query "
                f"{list(query.shape)}, got {list(keys.shape)}"
            )
    if keys1.dim() != keys2.dim():
        raise ValueError(
            "keys1 and keys2 must both be shared or both be per head, "
            f"got {list(keys1.shape)} and {list(keys2.shape)}"
        )
    smaller = min(keys1.shape[-2], keys2.shape[-2])
    if not 1 <= k <= smaller:
        raise ValueError(f"k must lie in [1, {smaller}], the size of the smaller codebook, got {k}")


def check_experts(
    x: Tensor, indices: Tensor, gates: Tensor, experts: Tensor, mask: Tensor | None, activation: str
) -> None:
    """The arguments of `expert_mlp`, but for the values of the indices."""
    check_tensors(x=x, indices=indices, gates=gates, experts=experts, mask=mask)
    check_choice("activation", activation, ACTIVATIONS)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [T, D], got {list(x.shape)}")
    tokens, dim = x.shape
    if experts.dim() != 3 or experts.shape[1] not in (2, 3) or experts.shape[2] != dim:
        raise ValueError(f"experts must have shape [N, 2 or 3, {dim}] to fit x, got {list(experts.shape)}")
    if indices.dim() != 2 or indices.shape[0] != tokens:
        raise ValueError(f"indices must have shape [{tokens}, K] to fit x, got {list(indices.shape)}")
    if indices.dtype != torch.int64:
        raise ValueError(f"indices must be int64, got {indices.dtype}")
    if gates.shape != indices.shape:
        raise ValueError(
            f"gates must have the shape of indices, {list(indices.shape)}, got {list(gates.shape)}"
        )
    check_floating(x=x, gates=gates, experts=experts)
    check_mask(mask, tokens)
    check_devices(x=x, indices=indices, gates=gates, experts=experts, mask=mask)


def check_norm(x: Tensor, mask: Tensor | None, **per_channel: Tensor) -> None:
    """The arguments of `masked_batch_norm`."""
    check_tensors(x=x, mask=mask, **per_channel)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [T, C], got {list(x.shape)}")
    tokens, channels = x.shape
    for name, tensor in per_channel.items():
        if tensor.shape != (channels,):
            raise ValueError(f"{name} must have shape [{channels}] to fit x, got {list(tensor.shape)}")
    check_floating(x=x, **per_channel)
    check_mask(mask, tokens)
    check_devices(x=x, **per_channel, mask=mask)


def check_row_state(
    table: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor, last_step: Tensor, history: Tensor, step: int
) -> None:
    """What the kernel of `rowwise_adamw` writes to.

    A state may come from another table's checkpoint, or from before its table changed dtype: its sizes and
    types are then not what the table's say.

    Raises:
        ValueError: a tensor of the state does not fit the table; the message names it.
    """
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    momenta = (wide,) if wide == torch.float64 else (wide, torch.bfloat16)
    allowed: dict[str, tuple[Tensor | None, tuple[torch.dtype, ...]]] = {
        "exp_avg": (exp_avg, momenta),
        "exp_avg_sq": (exp_avg_sq, (wide,)),
        "last_step": (last_step, (torch.int32,)),
        "history": (history, (torch.float64,)),
    }
    for name, (tensor, dtypes) in allowed.items():
        if tensor is not None and tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be {names} for a table in {table.dtype}, got {tensor.dtype}")
    check_devices(table=table, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, last_step=last_step, history=history)
    if exp_avg is not None:
        check_shape("exp_avg", exp_avg, table.shape)
    check_shape("exp_avg_sq", exp_avg_sq, table.shape if exp_avg_sq.dim() == 3 else table.shape[:2])
    check_shape("last_step", last_step, table.shape[:1])
    if history.dim() != 2 or history.shape[0] <= step or history.shape[1] != 3:
        raise ValueError(f"history must have shape [> {step}, 3], got {list(history.shape)}")
