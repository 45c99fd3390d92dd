"""The layer under torch.func, on the meta device and among fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    jacrev,
    jvp,
    replace_all_batch_norm_modules_,
    stack_module_state,
    vmap,
)

from million_experts import PEER

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True] * 5, [True, True, False, True, False], [True] * 4 + [False]])


def make_layer(**settings) -> PEER:
    return PEER(
        **{"dim": 6, "num_experts": 16, "num_heads": 2, "experts_per_head": 2, "key_dim": 4} | settings
    )


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_graph", [False, True])
def test_forward_mode_is_refused(query_norm, sparse_grad, training, with_graph):
    layer = make_layer(query_norm=query_norm, sparse_grad=sparse_grad).train(training)
    x = X[0]
    with (
        torch.set_grad_enabled(with_graph),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        jvp(layer, (x,), (x,))
    with (
        torch.set_grad_enabled(with_graph),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        layer(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("query_norm", ["batch", "layer"])
def test_gradients_of_each_sequence(query_norm, masked, assert_close):
    layer = make_layer(query_norm=query_norm)
    replace_all_batch_norm_modules_(layer)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
        return functional_call(layer, parameters, (x, mask)).square().sum()

    dims = (None, 0, 0 if masked else None)
    actual = vmap(grad(loss), dims)(parameters, X, MASK if masked else None)
    for i in range(3):
        layer.zero_grad()
        layer(X[i], MASK[i] if masked else None).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert_close(actual[name][i], parameter.grad)
    assert_close(
        jacrev(lambda x: layer(x))(X[0]).flatten(0, 1).sum(0),
        torch.autograd.grad(layer(leaf := X[0].clone().requires_grad_()).sum(), leaf)[0],
    )


@pytest.mark.parametrize("training", [False, True])
def test_an_ensemble(training, assert_close):
    layers = [make_layer().train(training) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    base = make_layer().train(training)
    y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, X)
    for i, layer in enumerate(layers):
        assert_close(y[i], layer(X[i]))
        assert_close(buffers["query_norm.running_mean"][i], layer.query_norm.running_mean)
        assert buffers["query_norm.num_batches_tracked"][i] == layer.query_norm.num_batches_tracked


@pytest.mark.parametrize("transform", [vmap, lambda layer: grad(lambda x: layer(x).sum())])
def test_statistics_that_cannot_move_say_so(transform):
    layer = make_layer()
    with pytest.raises(RuntimeError, match=r"statistics cannot move inside a transform .* \.eval\(\)"):
        transform(layer)(X)
    assert layer.query_norm.num_batches_tracked == 0
    assert not layer.query_norm.running_mean.any()
    transform(layer.eval())(X)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("query_norm", ["batch", "layer"])
@pytest.mark.parametrize("shared_width", [0, 4])
def test_fake_tensors(training, query_norm, shared_width):
    with FakeTensorMode():
        layer = make_layer(query_norm=query_norm, shared_width=shared_width).train(training)
        for mask in (None, torch.ones(3, 5, dtype=torch.bool)):
            y, routing = layer(torch.randn(3, 5, 6), mask, return_routing=True)
            y.sum().backward()
            assert y.shape == (3, 5, 6)
            assert routing.indices.shape == (3, 5, 2, 2)
            assert layer.experts.grad.shape == layer.experts.shape
        with torch.no_grad():
            assert layer(torch.randn(2, 6)).shape == (2, 6)


@pytest.mark.parametrize("training", [False, True])
def test_the_meta_device(training):
    with torch.device("meta"):
        layer = make_layer().train(training)
        assert layer(torch.empty(3, 5, 6), torch.ones(3, 5, dtype=torch.bool)).shape == (3, 5, 6)
    layer.reset_parameters()
    layer.to(torch.bfloat16).to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.query_norm.running_var.dtype == torch.float32
    assert nn.Module.train(layer)(X).isfinite().all()


def test_parameters_on_meta_and_buffers_not():
    """As `accelerate.init_empty_weights()` leaves a layer."""
    layer = make_layer()
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"))
    layer.reset_parameters()
    assert layer.query_norm.running_mean.device.type == "cpu"
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(X).isfinite().all()


@torch.no_grad()
def test_few_tokens_without_running_statistics(assert_close):
    layer = make_layer().eval()
    replace_all_batch_norm_modules_(layer)
    assert_close(layer(X[0]), layer.train()(X[0]))
