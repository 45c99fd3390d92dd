"""The layer and its optimiser on a GPU: forward, backward, autocast, compilation, training."""

from __future__ import annotations

import copy

import pytest
import torch

from million_experts import PEER
from million_experts.ops import resolve_backend
from million_experts.optim import RowwiseAdamW


@pytest.fixture
def layer(device, tiny, monkeypatch) -> PEER:
    """A layer of the default kind, which takes the Triton kernels."""
    torch.manual_seed(0)
    if tiny:
        monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**8)
        return PEER(8, (5, 4), num_heads=2, experts_per_head=3, key_dim=4, backend="triton")
    return PEER(256, 256**2).to(device)


@pytest.fixture
def x(layer, device, tiny) -> torch.Tensor:
    return torch.randn(
        4 if tiny else 1024, layer.dim, generator=torch.Generator(device).manual_seed(1), device=device
    )


def test_auto_takes_the_kernels(device, tiny):
    if tiny:
        pytest.skip("the interpreter runs for whoever asks for it by name")
    assert resolve_backend("auto", "cuda") == "triton"


def test_has_the_gradients_of_the_reference(layer, x, assert_close):
    layer.eval()  # a token's choice must not depend on the others' rounding
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    results = []
    for each in (layer, twin):
        y, routing = each(x, return_routing=True)
        results.append((y, routing.indices))
    # Where scores are equal but for rounding another expert may be chosen: such tokens are left out.
    same = (results[0][1] == results[1][1]).flatten(1).all(1)
    assert same.float().mean() > 0.99
    assert_close(results[0][0][same], results[1][0][same])
    for y, _ in results:
        y[same].square().mean().backward()
    for (name, p), right in zip(layer.named_parameters(), twin.parameters(), strict=True):
        error = (p.grad - right.grad).norm() / right.grad.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_loss_falls(sparse_grad, layer, x, tiny):
    layer.sparse_grad = sparse_grad
    optimizer = RowwiseAdamW(layer.parameters(), lr=1e-2)
    target, losses = torch.sin(x), []
    for _ in range(3 if tiny else 50):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * (1 if tiny else 0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, layer, x, device):
    with torch.autocast(device.type, dtype):
        y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_masked_token_has_no_part(layer, x):
    mask = torch.ones(len(x), dtype=torch.bool, device=x.device)
    mask[1] = False
    poisoned = x.clone()
    poisoned[1] = float("nan")
    y = layer(poisoned, mask=mask)
    assert not y[1].any()
    assert torch.isfinite(y).all()


def test_compiles(layer, x, tiny, assert_close):
    layer.eval()
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if tiny else "inductor")
    assert_close(compiled(x).detach(), expected)
