"""Tensors as plain data: a shape and a dtype, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "complex64")
WRONGS = (
    "shape", "dtype", "strided", "offset", "transposed", "expanded", "subclass", "wrapper", "emptied",
    "shrunk",
    "meta", "sparse", "negated", "values", "nan", "no tensor", "none", "reshaped storage",
)  # fmt: skip


class Subclass(Tensor):
    """A class of its own, and still plain memory."""


class Wrapper(Tensor):
    """No memory of its own: what it holds is asked for."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {func} for a wrapper")


wrongs = st.fixed_dictionaries(
    {
        "place": st.integers(0, 15),
        "what": st.sampled_from(WRONGS),
        "dtype": st.sampled_from(DTYPES),
        "shape": st.lists(st.integers(0, 9), max_size=4),
        "number": st.sampled_from([-(2**62), -1, 0, 1, 2, 3, 7, 2**31, 2**62]),
    }
)


def filled(shape: list[int] | tuple[int, ...], dtype: str, most: int = 1) -> Tensor:
    """Numbers that fit: indices below `most`, others normal."""
    torch.manual_seed(0)
    kind: torch.dtype = getattr(torch, dtype)
    if kind == torch.bool:
        return torch.rand(tuple(shape)) > 0.5
    if not (kind.is_floating_point or kind.is_complex):
        return torch.randint(0, max(1, most), tuple(shape), dtype=kind)
    return torch.randn(tuple(shape), dtype=kind)


def spoil(tensor: Tensor, wrong: dict[str, Any]) -> Any:
    """The tensor with one thing wrong."""
    what, number = wrong["what"], wrong["number"]
    if what == "shape":
        return filled(wrong["shape"], str(tensor.dtype).removeprefix("torch."))
    if what == "dtype":
        return tensor.to(getattr(torch, wrong["dtype"]))
    if what == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if what == "offset":
        return torch.cat([tensor.flatten(), tensor.flatten()])[tensor.numel() :].view(tensor.shape)
    if what == "transposed" and tensor.dim() > 1:
        return tensor.mT
    if what == "expanded" and tensor.dim() > 0:
        return tensor[:1].expand(tensor.shape)
    if what == "subclass":
        return tensor.as_subclass(Subclass)
    if what == "wrapper":
        return Wrapper(tensor)
    if what in ("emptied", "shrunk", "reshaped storage"):
        tensor = tensor.clone()
        bytes_ = {"emptied": 0, "shrunk": tensor.nbytes // 2, "reshaped storage": max(0, tensor.nbytes - 1)}
        tensor.untyped_storage().resize_(bytes_[what])
        return tensor
    if what == "meta":
        return tensor.to("meta")
    if what == "sparse" and tensor.dim() > 0:
        return tensor.to_sparse()
    if what == "negated" and tensor.is_floating_point():
        return torch.complex(tensor.float(), tensor.float()).conj().imag
    if what == "values" and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        info = torch.iinfo(tensor.dtype)
        return torch.full_like(tensor, max(info.min, min(info.max, number)))
    if what == "nan" and tensor.is_floating_point():
        return tensor * float("nan")
    if what == "no tensor":
        return [number]
    return None if what == "none" else tensor


def spoil_arguments(arguments: list[Any], wrong: list[dict[str, Any]]) -> list[Any]:
    """The arguments, each wrong thing done to the tensor or number at its place."""
    arguments = list(arguments)
    for one in wrong:
        place = one["place"] % len(arguments)
        given = arguments[place]
        if isinstance(given, Tensor) and type(given) is not Wrapper and given.layout == torch.strided:
            if given.device.type == "cpu" and given.untyped_storage().nbytes() >= given.nbytes:
                arguments[place] = spoil(given, one)
        elif isinstance(given, bool) or not isinstance(given, int):
            continue
        else:
            arguments[place] = one["number"]
    return arguments
