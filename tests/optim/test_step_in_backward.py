"""RowwiseAdamW fused into the backward pass: the same steps, no gradient, an error where one is needed."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from million_experts import PEER
from million_experts.optim import RowwiseAdamW, clip_grad_norm_, parameter_groups

BACKENDS = ["reference", "cpu"]


@pytest.fixture(autouse=True)
def _quick_initialisation(monkeypatch):
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)


@pytest.fixture(params=BACKENDS)
def backend(request):
    from million_experts.ops import available_backends

    if reason := available_backends()[request.param]:
        pytest.skip(reason)
    return request.param


def make_layer(**settings) -> PEER:
    torch.manual_seed(0)
    sizes = {"num_experts": 900, "num_heads": 3, "experts_per_head": 4, "key_dim": 16}
    return PEER(20, **sizes, **{"sparse_grad": True, **settings})


def make_optimizer(layer: PEER, **options) -> RowwiseAdamW:
    return RowwiseAdamW(parameter_groups(layer, 1e-2, 3e-2, table_weight_decay=0.1), **options)


def batches(steps: int) -> list[torch.Tensor]:
    return list(torch.randn(steps, 12, 20, generator=torch.Generator().manual_seed(1)))


def train(layer: PEER, optimizer: RowwiseAdamW, steps: int = 5, mask: torch.Tensor | None = None) -> None:
    for x in batches(steps):
        layer(x, mask=mask).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"second_moment": "row", "momentum_dtype": torch.bfloat16},
        {"second_moment": "row", "betas": (0.0, 0.9)},
    ],
)
def test_the_same_bits_as_a_step_after_backward(glu, masked, options, backend, monkeypatch):
    if backend == "cpu":  # several parts, the last one smaller
        monkeypatch.setattr("million_experts.ops.cpu.VISIT_BYTES", 10 * 2 * 20 * 4)
    mask = torch.arange(12) % 3 > 0 if masked else None
    separate = make_layer(glu=glu, backend=backend)
    fused = copy.deepcopy(separate)
    optimizers = [make_optimizer(layer, **options) for layer in (separate, fused)]
    optimizers[1].fuse_into_backward(fused)
    for layer, optimizer in zip((separate, fused), optimizers, strict=True):
        train(layer, optimizer, mask=mask)
    for (name, one), other in zip(separate.state_dict().items(), fused.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][index][name]), name


def test_no_gradient_of_the_table_is_kept(backend):
    layer = make_layer(backend=backend)
    before, optimizer = layer.experts.clone(), make_optimizer(layer)
    optimizer.fuse_into_backward(layer)
    layer(batches(1)[0]).sum().backward()
    assert layer.experts.grad is None
    assert layer.keys1.grad is not None
    assert not torch.equal(layer.experts, before)


def test_a_narrow_table_trains(backend):
    layer = make_layer(backend=backend).bfloat16()
    before, optimizer = layer.experts.clone(), make_optimizer(layer)
    optimizer.fuse_into_backward(layer)
    layer(batches(1)[0].bfloat16()).sum().backward()
    optimizer.step()
    assert (layer.experts != before).any()
    assert torch.isfinite(layer.experts).all()


def test_micro_batches_are_refused(backend):
    layer = make_layer(backend=backend)
    optimizer = make_optimizer(layer)
    optimizer.fuse_into_backward(layer)
    first, second = batches(2)
    layer(first).sum().backward()
    held = layer.experts.clone()
    loss = layer(second).sum()
    with pytest.raises(RuntimeError, match="second gradient came for a table that steps in backward"):
        loss.backward()
    assert torch.equal(layer.experts, held)
    optimizer.step()
    layer(second).sum().backward()


def test_clipping_is_refused(backend):
    layer = make_layer(backend=backend)
    make_optimizer(layer).fuse_into_backward(layer)
    with pytest.raises(ValueError, match="clipping needs the gradient of a table that steps in backward"):
        clip_grad_norm_(layer.parameters(), 1.0)


def test_layers_that_do_not_fit_are_refused(backend):
    dense, layer, other = make_layer(sparse_grad=False), make_layer(), make_layer()
    optimizer = RowwiseAdamW([*dense.parameters(), *layer.parameters()])
    with pytest.raises(ValueError, match="sparse_grad=True, got False"):
        optimizer.fuse_into_backward(dense)
    with pytest.raises(ValueError, match="no parameter of this optimiser"):
        optimizer.fuse_into_backward(other)
    optimizer.fuse_into_backward(layer)
    with pytest.raises(ValueError, match="steps in backward already"):
        optimizer.fuse_into_backward(layer)


def test_an_optimiser_that_is_gone_is_an_error(backend):
    layer = make_layer(backend=backend)
    optimizer = make_optimizer(layer)
    optimizer.fuse_into_backward(layer)
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="the optimiser that steps in backward for this table is gone"):
        layer(batches(1)[0]).sum().backward()


def test_copies_of_a_layer_and_of_an_optimiser_step_for_themselves():
    layer = make_layer()
    optimizer = make_optimizer(layer)
    optimizer.fuse_into_backward(layer)
    twin = copy.deepcopy(layer)
    twin(batches(1)[0]).sum().backward()
    assert twin.experts.grad.is_sparse
    copy.deepcopy(optimizer).step()
