"""Pure functions of tensors: product-key retrieval and the experts' forward pass, with gradients.

`reference.py` is the plain PyTorch that defines them, `library.py` registers them with PyTorch, and
`backends.py` says which implementations run on this machine.
"""

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from million_experts._typing import Bool, Float, Int
from million_experts.ops import library as _library  # noqa: F401  (registers torch.ops.million_experts)
from million_experts.ops import library_layer as _library_layer  # noqa: F401
from million_experts.ops.backends import advise_huge_pages, available_backends, resolve_backend
from million_experts.ops.checks import autocast_is_on, check_codebooks, check_experts, check_norm
from million_experts.ops.reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "advise_huge_pages",
    "available_backends",
    "expert_mlp",
    "masked_batch_norm",
    "product_key_topk",
    "resolve_backend",
]


def product_key_topk(
    query: Float[Tensor, "T H 2 d"],
    keys1: Float[Tensor, "*H1 n1 d"],
    keys2: Float[Tensor, "*H2 n2 d"],
    k: int,
    backend: str = "auto",
) -> tuple[Float[Tensor, "T H k"], Int[Tensor, "T H k"]]:
    """The k best of n1 * n2 product keys for each query (PEER, arXiv 2407.04153, section 2.2).

    Expert i*n2 + j scores `query[..., 0, :] . keys1[i] + query[..., 1, :] . keys2[j]`. The best k lie among
    the sums of the k best sub-keys of each half, so n1 + n2 + k*k sums stand for n1 * n2.

    Args:
        query: [T, H, 2, d], two halves for each of T tokens and H heads.
        keys1: [n1, d], one codebook for all heads, or [H, n1, d], one for each head.
        keys2: [n2, d] or [H, n2, d], in the form of `keys1`.
        k: experts a head, at most min(n1, n2).
        backend: one of "auto", "reference", "cpu", "triton".

    Returns:
        Raw scores [T, H, k], descending, in float32 (float64 if any input is), and indices [T, H, k], int64.
        Of equal scores the lowest index comes first. A query that is not finite gives valid indices.
        Gradients reach the query and the selected sub-keys only. Double backward is not supported.

    Raises:
        ValueError: a shape, dtype or k that does not fit; the message names the argument.
    """
    check_codebooks(query, keys1, keys2, k)
    return torch.ops.million_experts.product_key_topk(
        query, keys1, keys2, k, resolve_backend(backend, query.device.type)
    )


def expert_mlp(
    x: Float[Tensor, "T D"],
    indices: Int[Tensor, "T K"],
    gates: Float[Tensor, "T K"],
    experts: Float[Tensor, "N R D"],
    activation: str = "gelu",
    backend: str = "auto",
    *,
    mask: Bool[Tensor, " T"] | None = None,
    sparse_grad: bool = False,
) -> Float[Tensor, "T D"]:
    """The gated sum of K single-neuron experts for each token (PEER, arXiv 2407.04153, Eq. 2, Algorithm 1).

    `y[t] = sum_k gates[t, k] * act(x[t] . down) * up`, with GLU
    `act(x[t] . down) * (x[t] . gate) * up`, where (down, up) or (down, up, gate) are the rows of
    `experts[indices[t, k]]`. As in the paper *down* projects the token to one number and *up* projects it
    back; Llama's `up_proj` and `down_proj` are the other way round. No tensor of shape [T, K, D] is made,
    forward or backward.

    Args:
        x: [T, D] tokens.
        indices: [T, K] int64, experts in [0, N); an expert may appear more than once.
        gates: [T, K].
        experts: [N, 2, D], or [N, 3, D] with GLU.
        activation: "gelu" (with the error function), "relu" or "silu".
        backend: one of "auto", "reference", "cpu", "triton".
        mask: [T], True where the token is real. Other tokens give zeros, get zero gradient and touch no
            expert, whatever they hold.
        sparse_grad: the gradient of `experts` is a sparse COO tensor with one sparse dimension, ascending
            indices of the experts that were touched [n] and their values [n, R, D], in place of a dense one.
            `torch.compile` breaks the graph around the operation then: its graphs have no sparse tensors.

    Returns:
        y [T, D] in x's dtype. The dtypes of x, gates and experts may differ; sums are taken in float32
        (float64 if any input is). Under autocast x and gates are cast, the experts never are.
        Double backward is not supported.

    Raises:
        ValueError: a shape, dtype or activation that does not fit; the message names the argument.
        IndexError: an index outside [0, N).
    """
    check_experts(x, indices, gates, experts, mask, activation)
    if autocast_is_on(x):
        low = torch.get_autocast_dtype(x.device.type)
        x, gates = (t if t.dtype == torch.float64 else t.to(low) for t in (x, gates))
    run = _sparse_grad_mlp if sparse_grad else torch.ops.million_experts.expert_mlp
    y, _ = run(
        x, indices, gates, experts, mask, activation, resolve_backend(backend, x.device.type), sparse_grad
    )
    return y


# Graphs have no sparse tensors. `torch.compiler.disable` would import the compiler with this module.
@_disable_dynamo
def _sparse_grad_mlp(*arguments):
    return torch.ops.million_experts.expert_mlp(*arguments)


def masked_batch_norm(
    x: Float[Tensor, "T C"],
    mask: Bool[Tensor, " T"] | None,
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Float[Tensor, "T C"], Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Normalises each channel by the mean and variance of the real tokens, as BatchNorm does in training.

    Args:
        x: [T, C] tokens, at least one of them real.
        mask: [T], True where the token is real, or None where all are. The others do not count, whatever
            they hold, give zeros and get zero gradient.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        backend: one of "auto", "reference", "cpu", "triton".

    Returns:
        y [T, C], and mean [C] and biased variance [C], which carry no gradient; all in float32, float64 where
        x is float64. Double backward is not supported.

    Raises:
        ValueError: a shape or dtype that does not fit; the message names the argument.
    """
    check_norm(x, mask, weight=weight, bias=bias)
    return torch.ops.million_experts.masked_batch_norm(
        x, mask, weight, bias, eps, resolve_backend(backend, x.device.type)
    )
