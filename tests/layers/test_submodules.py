"""Layers call their submodules: whoever wraps, hooks, offloads, quantises or adapts one is seen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map

from million_experts import PEER
from million_experts.layers import MemoryPlus, ProductKeyMemory

SIZES = (4, 24)  # tokens: with and without the fused operation
NORMS = ("batch", "layer", "none")


def make(query_norm: str = "batch", **arguments) -> PEER:
    torch.manual_seed(0)
    layer = PEER(64, num_experts=256, num_heads=2, experts_per_head=4, key_dim=16, query_norm=query_norm,
                 **arguments)  # fmt: skip
    layer(torch.randn(50, 64))  # statistics that are not the identity
    return layer.eval()


def tokens(count: int) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


class Around(nn.Module):
    """A wrapper that passes everything through and counts."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *arguments, **named):
        self.calls += 1
        return self.inner(*arguments, **named)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("query_norm", NORMS)
@pytest.mark.parametrize("name", ["query_proj", "query_norm", "shared"])
def test_wrapping_a_submodule_changes_nothing(name, query_norm, count, assert_close):
    layer = make(query_norm, shared_width=8)
    with torch.no_grad():
        expected = layer(tokens(count))
        wrapper = Around(getattr(layer, name))
        setattr(layer, name, wrapper)
        assert_close(layer.eval()(tokens(count)), expected)
    assert wrapper.calls == 1


@pytest.mark.parametrize("query_norm", NORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_wrapping_the_norm_changes_nothing_in_training(query_norm, masked, assert_close):
    layer = make(query_norm).train()
    other = copy.deepcopy(layer)
    other.query_norm = Around(other.query_norm)
    mask = torch.arange(24) % 3 > 0 if masked else None
    x, y = tokens(24).requires_grad_(), tokens(24).requires_grad_()
    ours, theirs = other(x, mask=mask), layer(y, mask=mask)
    assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_close(x.grad, y.grad)
    assert_close(other.query_proj.weight.grad, layer.query_proj.weight.grad)
    expected = {name.replace("query_norm.", "query_norm.inner."): t for name, t in layer.state_dict().items()}
    assert {name: t.tolist() for name, t in other.state_dict().items()} == {
        name: t.tolist() for name, t in expected.items()
    }


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", ["query_proj", "query_norm", "shared", "shared.up"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_on_submodules_fire(kind, name, count):
    layer, seen = make(shared_width=8), []
    register = getattr(layer.get_submodule(name), f"register_{kind}_hook")
    handle = register(lambda *arguments: seen.append(name))
    with torch.no_grad():
        layer(tokens(count))
        handle.remove()
        layer(tokens(count))
    assert seen == [name]


@pytest.mark.parametrize("count", SIZES)
def test_a_hook_may_replace_what_a_submodule_gives(count, assert_close):
    layer = make("none")
    with torch.no_grad():
        doubled = make("none")
        doubled.query_proj.weight.mul_(2)
        expected = doubled(tokens(count))
        layer.query_proj.register_forward_hook(lambda module, arguments, output: 2 * output)
        assert_close(layer(tokens(count)), expected)


@pytest.mark.parametrize("count", SIZES)
def test_hooks_on_all_modules_fire(count):
    layer, seen = make(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with torch.no_grad():
            layer(tokens(count))
    finally:
        handle.remove()
    assert seen == [nn.Linear, type(layer.query_norm), PEER]


@pytest.mark.parametrize("count", SIZES)
def test_a_forward_put_on_the_instance_is_called(count, assert_close):
    # What accelerate does to every module that it offloads.
    layer = make("none")
    with torch.no_grad():
        expected = layer(tokens(count))
        weight = layer.query_proj.weight.detach().clone()
        layer.query_proj.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
        layer.query_proj.forward = lambda x: x @ weight.T
        assert_close(layer(tokens(count)), expected)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("query_norm", NORMS)
def test_an_offloaded_layer_computes_its_own_output(query_norm, count, assert_close):
    accelerate = pytest.importorskip("accelerate")
    layer = make(query_norm, shared_width=8)
    with torch.no_grad():
        expected = layer(tokens(count))
        offloaded = accelerate.cpu_offload(layer, torch.device("cpu"))
        for _ in range(2):
            assert_close(offloaded(tokens(count)), expected)


@pytest.mark.parametrize("count", SIZES)
def test_a_bias_that_was_added_counts(count, assert_close):
    layer = make("none")
    biased = nn.Linear(64, layer.query_proj.out_features)
    with torch.no_grad():
        # Tokens with a constant in their last number: a column of weights does what a bias does.
        x = tokens(count)
        x[:, -1] = 1
        biased.weight.copy_(layer.query_proj.weight)
        biased.weight[:, -1] = 0
        layer.query_proj.weight[:, -1] = biased.bias
        expected = layer(x)
        layer.query_proj = biased
        assert_close(layer(x), expected)
        narrow = copy.deepcopy(layer).bfloat16()
        weight, bias = (t.float() for t in narrow.query_proj.parameters())
        assert_close(narrow._project(x), nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("how", ["parametrization", "hook"])
def test_a_parametrised_weight_is_never_stale(how, count, assert_close):
    layer = make("none")
    weight = layer.query_proj.weight.detach().clone()
    if how == "parametrization":
        parametrizations.weight_norm(layer.query_proj)
        magnitude = layer.query_proj.parametrizations.weight.original0
    else:
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(layer.query_proj)
        magnitude = layer.query_proj.weight_g
    with torch.no_grad():
        layer(tokens(count))
        magnitude.mul_(3)
        other = make("none")
        other.query_proj.weight.copy_(3 * weight)
        assert_close(layer(tokens(count)), other(tokens(count)))


class Adapted(nn.Module):
    """A low-rank adapter beside a linear map, as PEFT adds one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory, MemoryPlus])
def test_adapters_get_gradients_and_merging_changes_nothing(kind, count, assert_close):
    torch.manual_seed(0)
    layer = kind(64, num_experts=256, num_heads=2, experts_per_head=4, key_dim=16)
    names = [name for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, Adapted(layer.get_submodule(name)))
    layer(tokens(24)).square().sum().backward()
    for name in names:
        for adapter in (layer.get_submodule(name).up, layer.get_submodule(name).down):
            assert adapter.weight.grad.abs().max() > 0
    layer.eval()
    with torch.no_grad():
        expected = layer(tokens(count))
        for name in names:
            adapted = layer.get_submodule(name)
            adapted.base_layer.weight += adapted.up.weight @ adapted.down.weight
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, adapted.base_layer)
        assert_close(layer(tokens(count)), expected)


class Quantised(Tensor):
    """An int8 weight that PyTorch sees as a float one: no plain memory, as torchao's are none."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __repr__(self):
        return f"Quantised({list(self.shape)})"

    def dequantised(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].codes, args[0].scale)
        given = args, kwargs or {}
        args, kwargs = tree_map(lambda t: t.dequantised() if isinstance(t, cls) else t, given)
        return func(*args, **kwargs)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", ["query_proj", "shared.down", "shared.up"])
def test_a_weight_that_is_no_plain_tensor_is_used_as_pytorch_sees_it(name, count, assert_close):
    layer = make("none", shared_width=8)
    linear = layer.get_submodule(name)
    with torch.no_grad():
        codes = (linear.weight / linear.weight.abs().amax(1, keepdim=True) * 127).round()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        linear.weight.copy_(codes * scale)
        expected = layer(tokens(count))
        linear.weight = nn.Parameter(Quantised(codes.to(torch.int8), scale), requires_grad=False)
        assert_close(layer(tokens(count)), expected)


@pytest.mark.parametrize("name", ["keys1", "keys2", "experts"])
@pytest.mark.parametrize("count", SIZES)
def test_a_table_or_codebook_that_is_no_plain_tensor_is_used_as_pytorch_sees_it(name, count):
    layer = make("none")
    value = getattr(layer, name).detach()
    codes, scale = (value * 100).round().to(torch.int8), torch.tensor(0.01)
    setattr(layer, name, nn.Parameter(Quantised(codes, scale), requires_grad=False))
    other = make("none")
    setattr(other, name, nn.Parameter(codes * scale))
    with torch.no_grad():
        torch.testing.assert_close(layer(tokens(count)), other(tokens(count)))


@pytest.mark.parametrize("count", SIZES)
def test_a_norm_left_in_training_mode_takes_the_statistics_of_the_batch(count, assert_close):
    layer = make()
    layer.query_norm.train()
    with torch.no_grad():
        whole = make().train()
        assert_close(layer(tokens(count)), whole(tokens(count)))


@pytest.mark.parametrize("query_norm", NORMS)
def test_initialising_anew_reaches_a_wrapped_norm_and_no_hook(query_norm):
    layer, seen = make(query_norm), []
    layer.query_norm = Around(layer.query_norm)
    layer.query_proj.register_forward_hook(lambda *_: seen.append("hook"))
    torch.manual_seed(3)
    layer.reset_parameters()
    assert not seen
    torch.manual_seed(3)
    plain = make(query_norm)
    torch.manual_seed(3)
    plain.reset_parameters()
    ours = [t.tolist() for t in layer.state_dict().values()]
    assert ours == [t.tolist() for t in plain.state_dict().values()]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_shared_branch_may_have_a_dtype_of_its_own(dtype, count):
    layer = make(shared_width=8)
    layer.shared = Around(layer.shared.to(dtype))
    with torch.no_grad():
        y = layer(tokens(count))
        expected = make(shared_width=8)(tokens(count))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=2**-7 * expected.abs().max().item())


MISFITS = {
    "an empty projection": lambda layer: _replace(layer.query_proj, "weight", torch.empty(0)),
    "a narrow projection": lambda layer: _replace(layer.query_proj, "weight", torch.zeros(32, 63)),
    "too few rows": lambda layer: _replace(layer, "experts", layer.experts[:100]),
    "too many rows": lambda layer: _replace(layer, "experts", layer.experts.repeat(2, 1, 1)),
    "rows of another width": lambda layer: _replace(layer, "experts", layer.experts[:, :, :32]),
    "one row per expert": lambda layer: _replace(layer, "experts", layer.experts[:, :1]),
    "k above a codebook": lambda layer: setattr(layer, "experts_per_head", 24),
    "k beyond a byte": lambda layer: setattr(layer, "experts_per_head", 256),
    "k of nothing": lambda layer: setattr(layer, "experts_per_head", 0),
    "more heads": lambda layer: setattr(layer, "num_heads", 4),
    "no heads": lambda layer: setattr(layer, "num_heads", 0),
    "another key width": lambda layer: _replace(layer, "keys1", torch.zeros(16, 4)),
    "fewer sub-keys": lambda layer: _replace(layer, "keys2", layer.keys2[:8]),
    "keys of too many dimensions": lambda layer: _replace(layer, "keys1", layer.keys1[None, None]),
    "a short norm": lambda layer: _replace(layer.query_norm, "weight", torch.ones(3)),
    "integers for experts": lambda layer: _replace(
        layer, "experts", torch.zeros(256, 2, 64, dtype=torch.int8)
    ),
    "storage that was freed": lambda layer: layer.experts.untyped_storage().resize_(0),
    "storage that shrank": lambda layer: layer.keys1.untyped_storage().resize_(100),
    "statistics without storage": lambda layer: layer.query_norm.running_var.untyped_storage().resize_(0),
}


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    value = value.detach().clone()
    setattr(module, name, nn.Parameter(value, requires_grad=value.is_floating_point()))


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_are_refused_before_they_are_touched(misfit):
    layer = make()
    MISFITS[misfit](layer)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError, TypeError, BufferError)):
        layer(tokens(4))


@pytest.mark.parametrize("misfit", ["too few rows", "too many rows", "k above a codebook", "k beyond a byte"])
def test_the_general_path_refuses_them_by_name(misfit):
    layer = make()
    MISFITS[misfit](layer)
    with torch.no_grad(), pytest.raises(ValueError, match=r"table|k must"):
        layer(tokens(24))
