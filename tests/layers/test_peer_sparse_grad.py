"""A layer with sparse_grad: trains like any other, and its step takes no memory for the pool."""

from __future__ import annotations

import copy

import pytest
import torch

from million_experts import PEER
from million_experts.optim import RowwiseAdamW


def make_layer(**settings) -> PEER:
    torch.manual_seed(0)
    return PEER(24, 400, num_heads=3, experts_per_head=4, key_dim=16, sparse_grad=True, **settings)


@pytest.mark.parametrize("query_norm", ["batch", "layer"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_gradient_is_that_of_a_dense_layer(query_norm, masked, backend, assert_close):
    layer = make_layer(query_norm=query_norm, backend=backend)
    dense = copy.deepcopy(layer)
    dense.sparse_grad = False
    x, mask = torch.randn(2, 25, 24), torch.rand(2, 25) > 0.4 if masked else None
    for each in (layer, dense):
        each(x, mask=mask).square().sum().backward()
    assert layer.experts.grad.is_sparse
    for (name, parameter), other in zip(layer.named_parameters(), dense.parameters(), strict=True):
        assert_close(parameter.grad.to_dense() if name == "experts" else parameter.grad, other.grad)


def test_compiled(backend, assert_close):
    torch.compiler.reset()
    layer = make_layer(backend=backend)
    compiled = copy.deepcopy(layer)
    run = torch.compile(compiled, backend="aot_eager")
    x = torch.randn(30, 24)
    expected, actual = layer(x), run(x)
    assert_close(actual, expected)
    for y in (expected, actual):
        y.square().sum().backward()
    assert compiled.experts.grad.is_sparse
    for (name, parameter), other in zip(layer.named_parameters(), compiled.parameters(), strict=True):
        gradients = [p.grad.to_dense() if name == "experts" else p.grad for p in (parameter, other)]
        assert_close(*gradients)


def test_a_few_steps_learn(backend):
    layer = make_layer(query_norm="layer", backend=backend)
    optimizer = RowwiseAdamW(layer.parameters(), lr=3e-2)
    x, target = torch.randn(64, 24), torch.randn(64, 24)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.flush()
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_takes_no_memory_for_the_pool(backend, measure_peaks):
    peaks = measure_peaks(
        f"""
        from million_experts import PEER
        from million_experts.optim import RowwiseAdamW

        layer = PEER(128, 512**2, num_heads=2, experts_per_head=4, key_dim=32, sparse_grad=True,
                     query_norm="layer", backend={backend!r})
        optimizer = RowwiseAdamW(layer.parameters())

        def step():
            for _ in range(2):
                layer(torch.randn(16, 128)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        peaks = {{"step": peak(step), "table": layer.experts.nbytes}}
        """
    )
    assert peaks["table"] == 2**28
    # Moments of rows that are met for the first time lie on pages of up to 2 MiB: 2 x 16 x 8 rows at most.
    assert peaks["step"] < 2**28
