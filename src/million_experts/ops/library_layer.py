"""What a layer needs beside retrieval and experts, as PyTorch sees it: BatchNorm with a mask, and the whole
layer for a few tokens without gradients."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from million_experts._arguments import check_choice
from million_experts.ops.backends import implementation
from million_experts.ops.checks import (
    check_accumulated,
    check_codebooks,
    check_devices,
    check_experts,
    check_floating,
    check_norm,
    check_shape,
)
from million_experts.ops.reference import accumulation_dtype
from million_experts.ops.registration import define, forward_mode_is_on, register_autograd


def _norm(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm(x, mask, weight=weight, bias=bias)
    return implementation(backend).masked_batch_norm(x, mask, weight, bias, eps)


def _norm_fake(x, mask, weight, bias, eps, backend):
    dtype = accumulation_dtype(x)
    statistic = x.new_empty(x.shape[1], dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype), statistic, torch.empty_like(statistic)


def _norm_backward(
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm(x, mask, weight=weight, mean=mean, variance=variance)
    check_floating(grad_y=grad_y)
    check_accumulated(accumulation_dtype(x), mean=mean, variance=variance)
    check_devices(x=x, grad_y=grad_y)
    check_shape("grad_y", grad_y, x.shape)
    return implementation(backend).masked_batch_norm_backward(grad_y, x, mask, weight, mean, variance, eps)


def _norm_backward_fake(grad_y, x, mask, weight, mean, variance, eps, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


define(
    "masked_batch_norm",
    "(Tensor x, Tensor? mask, Tensor weight, Tensor bias, float eps, str backend)"
    " -> (Tensor y, Tensor mean, Tensor variance)",
    _norm,
    _norm_fake,
)
define(
    "masked_batch_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor? mask, Tensor weight, Tensor mean, Tensor variance, float eps,"
    " str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _norm_backward,
    _norm_backward_fake,
)


def _norm_setup(ctx, inputs, output) -> None:
    x, mask, weight, _, ctx.eps, ctx.backend = inputs
    _, mean, variance = output
    ctx.save_for_backward(x, mask, weight, mean, variance)
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)


def _norm_autograd(ctx, grad_y, grad_mean, grad_variance):
    if grad_y is None:
        return (None,) * 6
    grad_x, grad_weight, grad_bias = torch.ops.million_experts.masked_batch_norm_backward(
        grad_y, *ctx.saved_tensors, ctx.eps, ctx.backend
    )
    return grad_x, None, grad_weight, grad_bias, None, None


register_autograd("masked_batch_norm", _norm_setup, _norm_autograd)
register_autograd("masked_batch_norm_backward")


def layer_inference(
    x: Tensor,
    query_weight: Tensor,
    query_norm: str,
    norm: list[Tensor],
    eps: float,
    keys1: Tensor,
    keys2: Tensor,
    experts: Tensor,
    num_heads: int,
    k: int,
    score: str,
    activation: str,
) -> Tensor:
    """A PEER layer's output [T, D] for few tokens x [T, D], in eval mode and without gradients, on the CPU.

    `norm` has weight and bias of the query norm, for "batch" followed by the running mean and variance.
    """
    arguments = (
        x, query_weight, query_norm, norm, eps, keys1, keys2, experts, num_heads, k, score, activation,
    )  # fmt: skip
    watched = (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or forward_mode_is_on()
        or type(x) is not Tensor
    )
    if watched:
        return torch.ops.million_experts.layer_inference(*arguments, "cpu")
    # Nobody looks on, there is no gradient, and the kernels' entry refuses what does not fit: the dispatcher
    # would add 17 us to 50.
    return implementation("cpu").layer_inference(*arguments)


def _inference(x, query_weight, query_norm, norm, eps, keys1, keys2, experts, *rest) -> Tensor:
    *numbers, backend = rest
    _check_layer(x, query_weight, query_norm, norm, eps, keys1, keys2, experts, *numbers)
    query_weight, keys1, keys2, experts, *norm = (
        t.contiguous() for t in (query_weight, keys1, keys2, experts, *norm)
    )
    return implementation(backend).layer_inference(
        x, query_weight, query_norm, norm, eps, keys1, keys2, experts, *numbers
    )


def _check_layer(
    x, query_weight, query_norm, norm, eps, keys1, keys2, experts, num_heads, k, score, activation
) -> None:
    check_choice("query_norm", query_norm, tuple(_NORM_TENSORS))
    check_choice("score", score, ("softmax", "sigmoid", "relu"))
    key_dim = 2 * keys1.shape[-1]
    check_codebooks(x.new_empty(len(x), num_heads, 2, key_dim // 2), keys1, keys2, k)
    for name, tensor in dict(x=x, query_weight=query_weight, keys1=keys1, keys2=keys2).items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}")
    picks = torch.empty(len(x), num_heads * k, dtype=torch.int64, device=x.device)
    check_experts(x, picks, x.new_empty(picks.shape), experts, None, activation)
    if experts.dtype == torch.float64:
        raise ValueError("experts must be float32 or narrower, got float64")
    check_shape("experts", experts, (keys1.shape[-2] * keys2.shape[-2], *experts.shape[1:]))
    check_shape("query_weight", query_weight, (num_heads * key_dim, x.shape[1]))
    if len(norm) != _NORM_TENSORS[query_norm]:
        raise ValueError(f"norm must hold {_NORM_TENSORS[query_norm]} tensors, got {len(norm)}")
    for tensor in norm:
        check_shape("norm", tensor, (key_dim if query_norm == "layer" else num_heads * key_dim,))
        if tensor.dtype != torch.float32:
            raise ValueError(f"norm must be float32, got {tensor.dtype}")


_NORM_TENSORS = {"none": 0, "layer": 2, "batch": 4}


def _inference_fake(x, *others):
    return x.new_empty(x.shape)


define(
    "layer_inference",
    "(Tensor x, Tensor query_weight, str query_norm, Tensor[] norm, float eps, Tensor keys1, Tensor keys2,"
    " Tensor experts, int num_heads, int k, str score, str activation, str backend) -> Tensor",
    _inference,
    _inference_fake,
)
register_autograd("layer_inference")
