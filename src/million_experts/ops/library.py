"""The operations as PyTorch sees them: schema, fake and autograd, written once for all backends.

This file has retrieval and the experts; `library_layer.py` has what else a layer needs.

Forward and backward are separate functional operations, so `torch.compile`, `torch.export` and autocast see
opaque calls with known shapes. `backend` is a resolved name (never "auto"). Shapes as in `reference`.
"""

import functools
from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from million_experts.ops.backends import implementation
from million_experts.ops.checks import (
    check_accumulated,
    check_codebooks,
    check_devices,
    check_experts,
    check_floating,
    check_range,
    check_shape,
)
from million_experts.ops.reference import Visit, accumulation_dtype, spread
from million_experts.ops.registration import define, register_autograd
from million_experts.ops.row_gradients import expect_row_gradient

#: Tables that are updated while their gradient comes, and what begins such an update, given `grad_y` of real
#: tokens, gates and `pre`: it returns the visitor, or None if this backward pass adds nothing to `grad`.
STEPS_IN_BACKWARD: MutableMapping[Tensor, Callable[[Tensor, Tensor, Tensor], Visit | None]] = (
    WeakIdKeyDictionary()
)


def _check_pool(indices: Tensor, mask: Tensor | None, num_experts: int) -> None:
    """Experts of masked tokens are not touched, whatever they are."""
    check_range("indices", indices if mask is None else indices[mask], num_experts, "the experts in the pool")


def _topk(query: Tensor, keys1: Tensor, keys2: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    check_codebooks(query, keys1, keys2, k)
    return implementation(backend).product_key_topk(query, keys1, keys2, k)


def _topk_fake(query: Tensor, keys1: Tensor, keys2: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    T, H = query.shape[:2]
    scores = query.new_empty(T, H, k, dtype=accumulation_dtype(query, keys1, keys2))
    return scores, query.new_empty(T, H, k, dtype=torch.int64)


def _topk_backward(
    grad_scores: Tensor, indices: Tensor, query: Tensor, keys1: Tensor, keys2: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_codebooks(query, keys1, keys2, indices.shape[-1])
    check_floating(grad_scores=grad_scores)
    check_devices(query=query, grad_scores=grad_scores, indices=indices)
    check_shape("indices", indices, (*query.shape[:2], indices.shape[-1]))
    check_shape("grad_scores", grad_scores, indices.shape)
    check_range("indices", indices, keys1.shape[-2] * keys2.shape[-2], "the experts in the pool")
    return implementation(backend).product_key_topk_backward(grad_scores, indices, query, keys1, keys2)


def _topk_backward_fake(grad_scores, indices, query, keys1, keys2, backend):
    return tuple(t.new_empty(t.shape) for t in (query, keys1, keys2))


define(
    "product_key_topk",
    "(Tensor query, Tensor keys1, Tensor keys2, int k, str backend) -> (Tensor scores, Tensor indices)",
    _topk,
    _topk_fake,
)
define(
    "product_key_topk_backward",
    "(Tensor grad_scores, Tensor indices, Tensor query, Tensor keys1, Tensor keys2, str backend)"
    " -> (Tensor grad_query, Tensor grad_keys1, Tensor grad_keys2)",
    _topk_backward,
    _topk_backward_fake,
)


def _topk_setup(ctx, inputs, output) -> None:
    query, keys1, keys2, _, ctx.backend = inputs
    ctx.save_for_backward(output[1], query, keys1, keys2)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _topk_autograd(ctx, grad_scores, grad_indices):
    if grad_scores is None:
        return None, None, None, None, None
    grads = torch.ops.million_experts.product_key_topk_backward(grad_scores, *ctx.saved_tensors, ctx.backend)
    return *grads, None, None


register_autograd("product_key_topk", _topk_setup, _topk_autograd)
register_autograd("product_key_topk_backward")


def _mlp(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    mask: Tensor | None,
    activation: str,
    backend: str,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    check_experts(x, indices, gates, experts, mask, activation)
    _check_pool(indices, mask, len(experts))
    run = implementation(backend).expert_mlp
    if mask is None:
        return run(x, indices, gates, experts, activation)
    y, pre = run(x[mask], indices[mask], gates[mask], experts, activation)
    all_pre = pre.new_zeros(len(pre), *indices.shape)
    all_pre[:, mask] = pre
    return spread(y, mask), all_pre


def _mlp_fake(x, indices, gates, experts, mask, activation, backend, sparse_grad=False):
    pre = x.new_empty(experts.shape[1] - 1, *indices.shape, dtype=accumulation_dtype(x, gates, experts))
    return x.new_empty(x.shape), pre


def _backward_of_real_tokens(
    run, grad_y, x, indices, gates, experts, pre, mask, activation, needs
) -> tuple[Tensor, ...]:
    """What a backend's backward returns for the tokens that the mask leaves, with zeros for the others."""
    check_experts(x, indices, gates, experts, mask, activation)
    check_floating(grad_y=grad_y, pre=pre)
    check_devices(x=x, grad_y=grad_y, pre=pre)
    check_shape("grad_y", grad_y, x.shape)
    check_shape("pre", pre, (experts.shape[1] - 1, *indices.shape))
    check_accumulated(accumulation_dtype(x, gates, experts), pre=pre)
    _check_pool(indices, mask, len(experts))
    if mask is None:
        return run(grad_y, x, indices, gates, experts, pre, activation, *needs)
    grad_x, grad_gates, *of_experts = run(
        grad_y[mask], x[mask], indices[mask], gates[mask], experts, pre[:, mask], activation, *needs
    )
    if needs[0]:
        grad_x = spread(grad_x, mask)
    if needs[1]:
        grad_gates = spread(grad_gates, mask)
    return grad_x, grad_gates, *of_experts


def _mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    pre: Tensor,
    mask: Tensor | None,
    activation: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    run = implementation(backend).expert_mlp_backward
    return _backward_of_real_tokens(run, grad_y, x, indices, gates, experts, pre, mask, activation, needs)


def _mlp_backward_fake(grad_y, x, indices, gates, experts, pre, mask, activation, needs, backend):
    return tuple(
        t.new_empty(t.shape if needed else 0) for t, needed in zip((x, gates, experts), needs, strict=True)
    )


define(
    "expert_mlp",
    "(Tensor x, Tensor indices, Tensor gates, Tensor experts, Tensor? mask, str activation, str backend,"
    " bool sparse_grad=False) -> (Tensor y, Tensor pre)",
    _mlp,
    _mlp_fake,
)
define(
    "expert_mlp_backward",
    "(Tensor grad_y, Tensor x, Tensor indices, Tensor gates, Tensor experts, Tensor pre, Tensor? mask,"
    " str activation, bool[] needs, str backend)"
    " -> (Tensor grad_x, Tensor grad_gates, Tensor grad_experts)",
    _mlp_backward,
    _mlp_backward_fake,
)


def _mlp_backward_touched(
    grad_y: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    pre: Tensor,
    mask: Tensor | None,
    activation: str,
    needs: list[bool],
    backend: str,
    visit: Visit | None = None,
) -> tuple[Tensor, ...]:
    run = functools.partial(implementation(backend).expert_mlp_backward_touched, visit=visit)
    return _backward_of_real_tokens(run, grad_y, x, indices, gates, experts, pre, mask, activation, needs)


def _mlp_backward_touched_fake(grad_y, x, indices, gates, experts, pre, mask, activation, needs, backend):
    grads = [t.new_empty(t.shape if needed else 0) for t, needed in zip((x, gates), needs, strict=True)]
    touched = torch.library.get_ctx().new_dynamic_size()
    rows = indices.new_empty(touched)
    return *grads, rows, experts.new_empty(touched, *experts.shape[1:])


define(
    "expert_mlp_touched_backward",
    "(Tensor grad_y, Tensor x, Tensor indices, Tensor gates, Tensor experts, Tensor pre, Tensor? mask,"
    " str activation, bool[] needs, str backend)"
    " -> (Tensor grad_x, Tensor grad_gates, Tensor rows, Tensor values)",
    _mlp_backward_touched,
    _mlp_backward_touched_fake,
)


def _mlp_setup(ctx, inputs, output) -> None:
    x, indices, gates, experts, mask, ctx.activation, ctx.backend, ctx.sparse_grad = inputs
    # Looked up here: what comes back from saved tensors under checkpointing is another tensor.
    ctx.step = STEPS_IN_BACKWARD.get(experts) if ctx.sparse_grad else None
    if ctx.sparse_grad and ctx.step is None and experts.requires_grad:
        expect_row_gradient(experts)
    ctx.save_for_backward(x, indices, gates, experts, output[1], mask)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _mlp_autograd(ctx, grad_y, grad_pre):
    if grad_y is None:
        return (None,) * 8
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    x, indices, gates, experts, pre, mask = ctx.saved_tensors
    ops = torch.ops.million_experts
    arguments = (grad_y, x, indices, gates, experts, pre, mask, ctx.activation)
    visit = None
    if ctx.step is not None and needs[2]:
        visit = ctx.step(grad_y if mask is None else grad_y[mask], gates, pre)
    if visit is not None:
        grad_x, grad_gates, _, _ = _mlp_backward_touched(*arguments, needs[:2], ctx.backend, visit)
        grad_experts = None
    elif ctx.sparse_grad and needs[2]:
        grad_x, grad_gates, rows, values = ops.expert_mlp_touched_backward(*arguments, needs[:2], ctx.backend)
        # Rows ascend strictly. Nothing is checked again: that would read every index once more.
        grad_experts = torch.sparse_coo_tensor(
            rows[None], values, experts.shape, check_invariants=False, is_coalesced=True
        )
    else:
        grad_x, grad_gates, grad_experts = ops.expert_mlp_backward(*arguments, needs, ctx.backend)
    grads = (grad_x, None, grad_gates, grad_experts, *(None,) * 4)
    return tuple(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad, strict=False))


register_autograd("expert_mlp", _mlp_setup, _mlp_autograd)
register_autograd("expert_mlp_backward")
register_autograd("expert_mlp_touched_backward")
