"""Experts by dense products on processors that multiply bfloat16 matrices (AMX).

Where tokens use a good part of few experts, every token times every row of the table takes less time than
the picks alone: matrix units multiply some ten times as fast as vectors. The products are torch's; the
kernels of `csrc/expert_products.cpp` pick from them and spread what the next product reads. `docs/kernels.md`
explains it.

Shapes as in `reference`. Numbers between two products are rounded to bfloat16, as in any layer under
autocast.
"""

import functools

import torch
from torch import Tensor

from million_experts.ops import _kernels
from million_experts.ops.reference import ACTIVATIONS

#: Up to so many experts in the pool for each that a token uses.
MOST_EXPERTS_PER_PICK = 7
#: From so many tokens on.
FEWEST_TOKENS = 512
#: Tokens at a time: a product of them with 1,000 rows fits the second cache.
CHUNK = 1024


@functools.cache
def has_matrix_units() -> bool:
    """Whether torch's products of bfloat16 matrices use AMX here."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and torch.backends.mkldnn.is_available()


class Rows:
    """The rows of a table in bfloat16, as the two matrices that tokens are multiplied with.

    Attributes:
        inner: [(R - 1) * N, D], down rows and then gate rows.
        up: [N, D].
    """

    def __init__(self, experts: Tensor):
        N, R, D = experts.shape
        rows = torch.empty(R, N, D, dtype=torch.bfloat16)
        for place, row in enumerate((0, 2, 1) if R == 3 else (0, 1)):
            rows[place].copy_(experts[:, row])
        self.inner, self.up = rows[:-1].view((R - 1) * N, D), rows[-1]


def are_finite(*results: Tensor) -> bool:
    """Whether all numbers are, and their sums.

    Where one is not, it need not be what the picks alone would give: a product makes NaN of an infinite row
    that nobody picked and the zero beside it, and oneDNN's read a neighbour's numbers with weight zero at the
    end of sums whose length is no multiple of 32.
    """
    return all(bool(result.sum(dtype=torch.float32).isfinite()) for result in results)


def pays(x: Tensor, indices: Tensor, gates: Tensor, experts: Tensor) -> bool:
    """Whether dense products are both precise enough for these types and faster for these shapes."""
    T, K = indices.shape
    return (
        x.dtype == torch.bfloat16
        and experts.dtype in (torch.bfloat16, torch.float32)
        and gates.dtype in (torch.bfloat16, torch.float32)
        and T >= FEWEST_TOKENS
        and 0 < len(experts) <= MOST_EXPERTS_PER_PICK * K
        and has_matrix_units()
    )


def used_experts(indices: Tensor, num_experts: int) -> Tensor:
    """Those that any token picked, ascending."""
    used = torch.zeros(num_experts, dtype=torch.bool)
    used[indices.flatten()] = True
    return used.nonzero()[:, 0]


def expert_mlp(
    x: Tensor, indices: Tensor, gates: Tensor, experts: Tensor, activation: str, threads: int
) -> tuple[Tensor, Tensor] | None:
    """See `cpu.expert_mlp`; None where what is not finite is left to the picks' own arithmetic."""
    rows = Rows(experts)
    (T, K), (N, R, _) = indices.shape, experts.shape
    indices, gates = indices.contiguous(), gates.float().contiguous()
    y, pre = torch.empty(x.shape, dtype=x.dtype), torch.empty(R - 1, T, K)
    for start in range(0, T, CHUNK):
        part = slice(start, start + CHUNK)
        products = x[part] @ rows.inner.T
        of_up = torch.empty(len(products), N, dtype=x.dtype)
        _kernels.expert_products_forward(
            indices, gates, pre, products, of_up, start, ACTIVATIONS.index(activation), threads
        )
        torch.mm(of_up, rows.up, out=y[part])
    return (y, pre) if are_finite(y) else None


def expert_mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    experts: Tensor,
    pre: Tensor,
    activation: str,
    needs_x: bool,
    needs_gates: bool,
    needs_experts: bool,
    threads: int,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `cpu.expert_mlp_backward`; None as in `expert_mlp`."""
    rows = Rows(experts)
    T, (N, R, D) = len(indices), experts.shape
    indices, wide_gates, pre = indices.contiguous(), gates.float().contiguous(), pre.contiguous()
    grad_y = grad_y.to(x.dtype)
    grad_x = torch.empty(x.shape if needs_x else 0, dtype=x.dtype)
    grad_gates = torch.empty(gates.shape if needs_gates else 0)
    grad_experts = torch.zeros(experts.shape if needs_experts else 0)
    for start in range(0, T, CHUNK):
        part = slice(start, start + CHUNK)
        products = grad_y[part] @ rows.up.T
        of_up = torch.empty(len(products), N, dtype=x.dtype)
        of_inner = torch.empty(len(products), (R - 1) * N, dtype=x.dtype)
        _kernels.expert_products_backward(
            indices, wide_gates, pre, products, of_up, of_inner, grad_gates if needs_gates else None, start,
            ACTIVATIONS.index(activation), threads,
        )  # fmt: skip
        if needs_x:
            torch.mm(of_inner, rows.inner, out=grad_x[part])
        if needs_experts:
            of_rows = (of_inner.T @ x[part]).view(R - 1, N, D)
            for row, gradient in zip((0, 2), of_rows, strict=False):
                grad_experts[:, row] += gradient
            grad_experts[:, 1] += of_up.T @ grad_y[part]
    if not are_finite(grad_x, grad_gates, grad_experts):
        return None
    return grad_x, grad_gates.to(gates.dtype), grad_experts.to(experts.dtype)
