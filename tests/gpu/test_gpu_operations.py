"""The Triton kernels on a GPU, at shapes that are used, against the reference in float64 on the same GPU."""

from __future__ import annotations

import pytest
import torch
from expert_cases import SHAPES, Inputs, make_inputs, step
from torch import Tensor

from million_experts.ops import product_key_topk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference_step(inputs: Inputs, grad_y: Tensor) -> list[Tensor]:
    x, indices, gates, experts = inputs
    return step((x.double(), indices, gates.double(), experts.double()), grad_y.double(), "reference")


def assert_agrees(actual: list[Tensor], inputs: Inputs, grad_y: Tensor, assert_close) -> None:
    """Only the rows that were picked go to float64: a pool of a million is 24 GiB there."""
    x, indices, gates, experts = inputs
    rows, places = indices.unique(return_inverse=True)
    *expected, right = reference_step((x, places, gates, experts[rows]), grad_y)
    *results, grad = actual
    for one, other in zip(results, expected, strict=True):
        assert_close(one, other)
    if grad.is_sparse:
        assert torch.equal(grad._indices()[0], rows)
        grad = grad._values()
    else:
        assert grad.count_nonzero() == grad[rows].count_nonzero()
        grad = grad[rows]
    assert_close(grad, right)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_agree_with_the_reference(name, glu, dtype, device, tiny, needs_bytes, assert_close):
    T, K, N, D = SHAPES[name][tiny]
    of_pool = N * (3 if glu else 2) * D * dtype.itemsize
    sparse_grad = name == "one token"  # a dense gradient would be as large as its pool, the largest
    needs_bytes(1.2 * of_pool if sparse_grad else 3 * of_pool)
    inputs, grad_y = make_inputs((T, K, N, D), glu, dtype, device)
    assert_agrees(step(inputs, grad_y, "triton", sparse_grad=sparse_grad), inputs, grad_y, assert_close)


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("name", ["few tokens an expert", "tiles"])
def test_the_same_bits_on_every_run(name, sparse_grad, device, tiny):
    inputs, grad_y = make_inputs(SHAPES[name][tiny], True, torch.float32, device)
    first = step(inputs, grad_y, "triton", sparse_grad=sparse_grad)
    for _ in range(1 if tiny else 5):
        for bits, right in zip(step(inputs, grad_y, "triton", sparse_grad=sparse_grad), first, strict=True):
            assert torch.equal(bits.to_dense(), right.to_dense())


def test_an_expert_that_every_token_chose(device, tiny, assert_close):
    inputs, grad_y = make_inputs(
        (40, 8, 90, 20) if tiny else (4096, 128, 256**2, 256), False, torch.float32, device
    )
    inputs[1][:, ::2] = 7
    assert_agrees(step(inputs, grad_y, "triton"), inputs, grad_y, assert_close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_table_beyond_32_bits(dtype, device, tiny, needs_bytes, assert_close):
    N, D = (30, 20) if tiny else (2**20 + 2**17, 1024)
    needs_bytes(1.2 * 2 * N * D * 2)
    experts = torch.zeros(N, 2, D, dtype=dtype, device=device)
    (x, indices, gates, rows), grad_y = make_inputs((3, 4, 12, D), False, dtype, device)
    indices = N - 1 - torch.arange(12, device=device).view(3, 4)
    experts[indices.flatten()] = rows
    actual = step((x, indices, gates, experts), grad_y, "triton", sparse_grad=True)
    small = (x, torch.arange(12, device=device).view(3, 4), gates, rows)
    *expected, right = reference_step(small, grad_y)
    for one, other in zip(actual, expected, strict=False):
        assert_close(one, other)
    values = actual[3]._values().flip(0)  # rows ascend, and were laid from the end
    assert_close(values, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("n", "k", "d"), [(1024, 16, 64), (128, 32, 128), (36, 30, 32)])
def test_retrieval_agrees_with_the_reference(n, k, d, dtype, shared, device, tiny, assert_close):
    T, H, n, k, d = (2, 1, 9, 3, 4) if tiny else (512, 8, n, k, d)
    generator = torch.Generator(device).manual_seed(0)
    # Small whole numbers: their sums are exact, so equal scores are equal and the winners are the same.
    query, keys1, keys2 = (
        torch.randint(-4, 5, shape, generator=generator, device=device).to(dtype)
        for shape in ((T, H, 2, d), *[(n, d) if shared else (H, n, d)] * 2)
    )
    results = []
    for backend in ("triton", "reference"):
        tensors = [t.clone().requires_grad_() for t in (query, keys1, keys2)]
        scores, indices = product_key_topk(*tensors, k, backend=backend)
        grad = torch.randn(scores.shape, generator=torch.Generator(device).manual_seed(1), device=device)
        scores.backward(grad)
        results.append((scores.detach(), indices, *(t.grad for t in tensors)))
    assert torch.equal(results[0][1], results[1][1])
    for actual, right in zip(*results, strict=True):
        assert_close(actual.double(), right, torch.float32 if actual.dtype == torch.int64 else actual.dtype)
