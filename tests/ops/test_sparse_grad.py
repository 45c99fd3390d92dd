"""expert_mlp with sparse_grad: the gradient of the touched experts alone, numbers as in the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from million_experts.ops import ACTIVATIONS, expert_mlp

BACKWARD = torch.ops.million_experts.expert_mlp_touched_backward.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(seed: int, T: int, K: int, N: int, D: int, glu: bool = False, dtype=torch.float32) -> Inputs:
    """x, indices, gates, experts; `dtype` is that of the experts."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, gates, experts = (
        torch.randn(s, generator=generator, dtype=wide) for s in ((T, D), (T, K), (N, 3 if glu else 2, D))
    )
    return x, torch.randint(0, N, (T, K), generator=generator), gates, experts.to(dtype)


def gradients(inputs: Inputs, activation: str = "gelu", **options) -> list[Tensor]:
    x, indices, gates, experts = inputs
    x, gates, experts = (t.detach().clone().requires_grad_() for t in (x, gates, experts))
    y = expert_mlp(x, indices, gates, experts, activation, **options)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype))
    return [x.grad, gates.grad, experts.grad]


def touched(indices: Tensor, mask: Tensor | None) -> Tensor:
    return (indices if mask is None else indices[mask]).unique()


@given(
    seed=st.integers(0, 2**30),
    T=st.integers(0, 30),
    K=st.integers(1, 9),
    N=st.sampled_from([1, 5, 40, 3000]),
    D=st.sampled_from([1, 7, 16, 33, 100]),
    glu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    masked=st.booleans(),
)
def test_the_same_numbers_as_the_dense_gradient(
    seed, T, K, N, D, glu, dtype, activation, masked, backend, assert_close
):
    inputs = make_inputs(seed, T, K, N, D, glu, dtype)
    mask = torch.rand(T, generator=torch.Generator().manual_seed(seed)) > 0.5 if masked else None
    options = {"backend": backend, "mask": mask}
    *expected, dense = gradients(inputs, activation, **options)
    *actual, sparse = gradients(inputs, activation, sparse_grad=True, **options)
    for gradient, right in zip(actual, expected, strict=True):
        assert torch.equal(gradient, right)
    assert sparse.is_sparse
    rows = sparse._indices()
    assert torch.equal(rows[0], touched(inputs[1], mask))
    assert sparse._values().shape == (rows.shape[1], *dense.shape[1:])
    assert sparse.dtype == dtype
    assert_close(sparse.to_dense(), dense)


def test_every_instruction_set_has_the_same_bits_as_its_dense_gradient(kernels):
    # 3 picks of 3000: the dense gradient goes row by row too.
    inputs = make_inputs(1, 40, 3, 3000, 100, True)
    dense, sparse = (gradients(inputs, backend="cpu", sparse_grad=s)[2] for s in (False, True))
    assert torch.equal(sparse.to_dense(), dense)


@pytest.mark.parametrize("threads", [2, 4])
def test_the_same_bits_for_any_number_of_threads(threads, kernels):
    inputs, before = make_inputs(2, 500, 16, 2000, 40), torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(gradients(inputs, backend="cpu", sparse_grad=True))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())


def test_micro_batches_add_up_without_becoming_dense(backend, assert_close):
    x, indices, gates, experts = make_inputs(3, 8, 4, 50, 10)
    experts.requires_grad_()
    for half in (slice(4), slice(4, None)):
        expert_mlp(
            x[half], indices[half], gates[half], experts, backend=backend, sparse_grad=True
        ).sum().backward()
        assert experts.grad.is_sparse
    sums, experts.grad = experts.grad, None
    expert_mlp(x, indices, gates, experts, backend=backend).sum().backward()
    assert_close(sums.to_dense(), experts.grad)


def test_an_optimiser_of_torch_takes_it(backend):
    x, indices, gates, experts = make_inputs(4, 8, 4, 500, 10)
    experts *= 0.1  # no pre-activation so far below zero that GELU gives nothing back
    table = torch.nn.Parameter(experts.clone())
    expert_mlp(x, indices, gates, table, backend=backend, sparse_grad=True).sum().backward()
    torch.optim.SparseAdam([table], lr=0.1).step()
    moved = (table != experts).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(moved, indices.unique())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("needs", [[True, True], [False, True], [True, False]])
def test_registration_is_sound(masked, needs, backend):
    x, indices, gates, experts = make_inputs(5, 6, 3, 20, 5)
    mask = torch.tensor([True, False, True, True, False, True]) if masked else None
    pre = torch.randn(1, 6, 3)
    arguments = (torch.randn(6, 5), x, indices, gates, experts, pre, mask, "gelu", needs, backend)
    grad_x, grad_gates, rows, values = BACKWARD(*arguments)
    assert [t.numel() > 0 for t in (grad_x, grad_gates)] == needs
    assert len(rows) == len(values)
    opcheck(BACKWARD, arguments)


def test_finite_differences(backend):
    x, indices, gates, experts = make_inputs(6, 4, 3, 6, 5, True, torch.float64)
    x, gates, experts = (t.requires_grad_() for t in (x, gates, experts))

    def run(x, gates, experts):
        # gradcheck refuses sparse gradients: this copy makes them dense on their way out.
        return expert_mlp(x, indices, gates, Densify.apply(experts), backend=backend, sparse_grad=True)

    torch.autograd.gradcheck(run, (x, gates, experts))


class Densify(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table):
        return table.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to_dense() if grad.is_sparse else grad  # dense zeros where there is none
