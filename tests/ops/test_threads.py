"""Each operation gives the same bits for any number of threads, at sizes at which the work is divided."""

from __future__ import annotations

import pytest
import torch

from million_experts.ops import expert_mlp, masked_batch_norm, product_key_topk

T = 300


def run(function, tensors, weights) -> list[torch.Tensor]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    y, *others = function(*tensors)
    y.backward(weights(y.shape).to(y.dtype))
    return [y.detach(), *others, *(t.grad for t in tensors)]


def assert_same_bits(function, *tensors) -> None:
    def weights(shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    expected = run(function, tensors, weights)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for _ in range(2):
                for a, b in zip(run(function, tensors, weights), expected, strict=True):
                    assert torch.equal(a, b), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
# With 1000 experts of at least 2 MiB blocks of them, and gradients column by column; with 20,000 neither.
@pytest.mark.parametrize("N", [1000, 20_000])
@pytest.mark.parametrize("masked", [False, True])
def test_expert_mlp(glu, table, N, masked, kernels):
    torch.manual_seed(0)
    R, K, D = 3 if glu else 2, 32, 520
    if N == 1000:
        assert kernels.block_experts(T, K, N, R * D * table.itemsize) < N
    else:
        assert kernels.block_experts(T, K, N, R * D * table.itemsize) == N
    mask = torch.rand(T) > 0.2 if masked else None
    indices = torch.randint(0, N, (T, K))
    assert_same_bits(
        lambda x, gates, experts: (expert_mlp(x, indices, gates, experts, backend="cpu", mask=mask),),
        torch.randn(T, D),
        torch.randn(T, K),
        (torch.randn(N, R, D) / D**0.5).to(table),
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [(100, 90), (700, 900)])
def test_product_key_topk(shared, n, kernels):
    torch.manual_seed(0)
    heads = () if shared else (5,)
    assert_same_bits(
        lambda *t: product_key_topk(*t, 16, "cpu"),
        torch.randn(900, 5, 2, 20),
        *(torch.randn(*heads, size, 20) for size in n),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_masked_batch_norm(masked, kernels):
    torch.manual_seed(0)
    mask = torch.rand(1000) > 0.2 if masked else None
    assert_same_bits(
        lambda x, weight, bias: masked_batch_norm(x, mask, weight, bias, backend="cpu"),
        torch.randn(1000, 1000),
        torch.randn(1000),
        torch.randn(1000),
    )
