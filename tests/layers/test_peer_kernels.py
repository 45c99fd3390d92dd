"""The layer with the C++ kernels: few tokens at once, threads, and the same layer on the reference."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from million_experts import PEER
from million_experts.layers.peer import FUSED_TOKENS
from million_experts.ops import ACTIVATIONS, available_backends

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the kernels were not built")

SCORES = ("softmax", "sigmoid", "relu")
QUERY_NORMS = ("batch", "layer", "none")


class Calls(TorchDispatchMode):
    """The names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def is_fused(layer: PEER, *inputs, **options) -> bool:
    with Calls() as calls:
        layer(*inputs, **options)
    fused = "million_experts::layer_inference" in calls.names
    assert fused != ("million_experts::expert_mlp" in calls.names)
    return fused


def float_layer(make_layer, **settings) -> PEER:
    small = {"dim": 24, "num_experts": (12, 11), "num_heads": 3, "experts_per_head": 4, "key_dim": 10}
    return make_layer(**(small | settings)).float().eval()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("glu", "share_keys"), [(True, False), (False, True)])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, torch.float16])
def test_a_few_tokens_without_gradients(
    score, query_norm, activation, glu, share_keys, table, make_layer, assert_close
):
    settings = dict(score=score, query_norm=query_norm, activation=activation, glu=glu, share_keys=share_keys)
    layer = float_layer(make_layer, **settings)
    layer.experts.data = layer.experts.data.to(table)
    for tokens in range(21):
        x = torch.randn(tokens, layer.dim)
        mask = torch.rand(tokens) > 0.3 if tokens % 3 == 0 else None
        general = layer(x, mask=mask)
        assert general.requires_grad
        with torch.no_grad():
            y = layer(x, mask=mask)
            assert_close(y, general)
            if mask is not None:
                assert not y[~mask].any()
            if tokens in (1, FUSED_TOKENS, FUSED_TOKENS + 1):
                assert is_fused(layer, x, mask=mask) == (tokens <= FUSED_TOKENS)
        with torch.inference_mode():
            assert torch.equal(layer(x, mask=mask), y)


@torch.no_grad()
def test_what_the_fused_operation_cannot_do_goes_the_general_way(make_layer):
    layer, x = float_layer(make_layer), torch.randn(2, 24)
    assert is_fused(layer, x)
    assert is_fused(layer, x[0])
    assert is_fused(layer, x.view(1, 2, 24))
    assert not is_fused(layer, x, return_routing=True)
    assert not is_fused(layer.train(), x)
    layer.eval()
    seen = []
    handle = layer.register_routing_hook(lambda _, routing: seen.append(routing))
    assert not is_fused(layer, x)
    assert len(seen) == 1
    handle.remove()
    assert is_fused(layer, x)
    assert not is_fused(float_layer(make_layer, backend="reference"), x)
    for dtype in (torch.float64, torch.bfloat16):
        assert not is_fused(layer, x.to(dtype))
        assert layer(x.to(dtype)).dtype == dtype
        assert not is_fused(copy.deepcopy(layer).to(dtype), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(layer, x)
    with torch.enable_grad():
        assert not is_fused(layer, x)


@pytest.mark.parametrize("name", ["keys2", "keys1", "query_norm", "query_proj"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_part_of_another_dtype_goes_the_general_way(name, dtype, make_layer):
    # The operation would read its memory as float32.
    layer, x = float_layer(make_layer), torch.randn(2, 24)
    part = getattr(layer, name)
    if isinstance(part, Tensor):
        part.data = part.data.to(dtype)
    else:
        part.to(dtype)
    assert not is_fused(layer, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_masked_token_counts_for_nothing_whatever_it_holds(value, make_layer):
    layer, x = float_layer(make_layer), torch.randn(4, 24)
    mask = torch.tensor([True, False, True, False])
    expected = layer(x, mask=mask)
    x[~mask] = value
    assert torch.equal(layer(x, mask=mask), expected)
    assert torch.equal(layer(x[mask]), expected[mask])
    assert not layer(x, mask=torch.zeros(4, dtype=torch.bool)).any()
    assert not torch.isfinite(layer(x)[~mask]).any()
    layer.experts.fill_(float("nan"))  # it touches none
    assert not layer(x, mask=mask)[~mask].any()


@torch.no_grad()
def test_compiled_and_exported_without_gradients(make_layer, assert_close):
    layer = float_layer(make_layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    dynamic = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(layer, (torch.randn(3, 24),)).module()
    anything = torch.export.export(
        layer, (torch.randn(3, 24),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},)
    ).module()
    for tokens in (3, 1, 20, 5):
        x = torch.randn(tokens, 24)
        expected = layer(x)
        for run in (
            compiled,
            dynamic,
            *([anything] if tokens > 1 else []),
            *([exported] if tokens == 3 else []),
        ):
            assert_close(run(x), expected)


def step(layer: PEER, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x, mask=mask)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **{n: b.clone() for n, b in layer.named_buffers()}}


@pytest.mark.parametrize("num_experts", [(40, 25), (160, 125)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [300, 2048])
def test_the_same_bits_for_any_number_of_threads(num_experts, masked, glu, training, tokens):
    torch.manual_seed(0)
    layer = PEER(256, num_experts, 8, 16, 64, glu=glu, init_std=1.0, backend="cpu").train(training)
    x, mask = torch.randn(tokens, 256), torch.rand(tokens) > 0.2 if masked else None
    start, before = copy.deepcopy(layer.state_dict()), torch.get_num_threads()
    expected = step(layer, x, mask)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            layer.load_state_dict(start)
            for name, tensor in step(layer, x, mask).items():
                assert torch.equal(tensor, expected[name]), f"{name} with {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_step_is_that_of_the_reference(query_norm, score, masked, assert_close):
    torch.manual_seed(0)
    sizes = dict(num_heads=3, experts_per_head=5, key_dim=22, query_norm=query_norm, score=score)
    layer = PEER(35, (30, 29), **sizes, share_keys=not masked, glu=masked, backend="cpu")
    twin = copy.deepcopy(layer).double()
    twin.backend = "reference"
    x, mask = torch.randn(200, 35), torch.rand(200) > 0.2 if masked else None
    wide = step(twin, x.double(), mask)
    for name, tensor in step(layer, x, mask).items():
        # 200 tokens pass through BatchNorm, scores and softmax in float32: each costs a few last bits.
        assert_close(tensor * 0.1, wide[name] * 0.1, torch.float32)


def test_a_layer_is_put_on_huge_pages_before_it_is_written(monkeypatch):
    asked = []
    monkeypatch.setattr("million_experts.layers.peer.advise_huge_pages", lambda t: asked.append(t.data_ptr()))
    monkeypatch.setattr(PEER, "reset_parameters", lambda self: asked.append("written"))
    layer = PEER(8, 16, 1, 2, 4)
    assert asked == [layer.experts.data_ptr(), "written"]


def test_kernels_are_what_a_layer_uses(make_layer, monkeypatch):
    cpu = importlib.import_module("million_experts.ops.cpu")
    used = []
    for name in ("product_key_topk", "expert_mlp", "masked_batch_norm", "layer_inference"):
        original = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *a, name=name, original=original: used.append(name) or original(*a)
        )
    layer = float_layer(make_layer)
    used.clear()
    layer.train()(torch.randn(4, 24))
    with torch.no_grad():
        layer.eval()(torch.randn(4, 24))
    assert used == ["masked_batch_norm", "product_key_topk", "expert_mlp", "layer_inference"]
