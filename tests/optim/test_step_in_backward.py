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


def fused(backend, **settings):
    layer = make_layer(backend=backend, **settings)
    optimizer = make_optimizer(layer)
    optimizer.fuse_into_backward(layer)
    return layer, optimizer


def test_only_a_backward_pass_that_is_asked_for_the_gradient_moves_the_table(backend):
    layer, optimizer = fused(backend)
    x = batches(1)[0].requires_grad_()
    twin = copy.deepcopy(layer)  # whose gradients are kept
    twin(x).square().sum().backward()
    expected, x.grad = x.grad, None
    held = layer.experts.detach().clone()
    loss = layer(x).square().sum()

    (grad_x,) = torch.autograd.grad(loss, [x], retain_graph=True)
    assert torch.equal(grad_x, expected)
    loss.backward(inputs=[x, layer.keys1], retain_graph=True)
    assert torch.equal(x.grad, expected)
    grad_x, of_table = torch.autograd.grad(loss, [x, layer.experts], retain_graph=True)
    assert torch.equal(grad_x, expected)
    assert torch.equal(of_table.to_dense(), twin.experts.grad.to_dense()), "handed out, not used up"
    layer.experts.requires_grad_(False)  # frozen between forward and backward
    loss.backward(retain_graph=True)
    layer.experts.requires_grad_(True)
    assert torch.equal(layer.experts, held)
    assert layer.experts.grad is None
    assert not optimizer.state

    loss.backward(inputs=[layer.experts])
    assert not torch.equal(layer.experts, held)
    assert layer.experts.grad is None
    optimizer.step()


def test_a_frozen_table_does_not_move(backend):
    layer, optimizer = fused(backend)
    layer.experts.requires_grad_(False)
    held = layer.experts.detach().clone()
    layer(batches(1)[0]).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.experts, held)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_recomputation_moves_the_table_once(checkpointed, backend):
    layer, optimizer = fused(backend, query_norm="none")
    x = batches(1)[0].requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=checkpointed)
    y.square().sum().backward()
    optimizer.step()
    assert optimizer.state[layer.experts]["step"] == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("of", ["gradient", "token"])
def test_a_gradient_that_is_not_finite_does_not_move_the_table(of, value, backend):
    layer, optimizer = fused(backend)
    held = layer.experts.detach().clone()
    x = batches(1)[0]
    gradient = torch.ones_like(x)
    (gradient if of == "gradient" else x)[3, 5] = value
    with pytest.raises(FloatingPointError, match=r"not finite.*leave fuse_into_backward out"):
        layer.eval()(x).backward(gradient)
    assert torch.equal(layer.experts, held)
    assert not optimizer.state
    mask = torch.arange(12) != 3
    layer.zero_grad()
    x[3, 5] = value
    layer(x, mask=mask).backward(gradient)  # it stood in a masked token
    optimizer.step()
    assert layer.experts.isfinite().all()
    assert not torch.equal(layer.experts, held)


def test_a_float16_table_that_alone_overflows_stays_finite(backend):
    layer, _ = fused(backend)
    layer.experts.data = layer.experts.data.half()
    with pytest.raises(FloatingPointError, match="not finite"):
        (layer(batches(1)[0]) * 2.0**24).sum().backward()
    assert layer.experts.isfinite().all()


@pytest.mark.parametrize("clips", [False, True])
def test_a_scaler_is_refused(clips, backend):
    layer, optimizer = fused(backend)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(layer(batches(1)[0]).square().sum()).backward()
    if clips:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match="fuse_into_backward and a GradScaler exclude each other"):
        scaler.step(optimizer)
    assert layer.experts.isfinite().all()
    idle = torch.amp.GradScaler("cpu", enabled=False)
    idle.step(optimizer)
    separate = make_layer(backend=backend)
    kept = make_optimizer(separate)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(separate(batches(1)[0]).square().sum()).backward()
    scaler.step(kept)
    assert kept.state[separate.experts]["step"] == 1
