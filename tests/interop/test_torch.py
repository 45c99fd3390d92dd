"""What PyTorch itself wraps around modules and weights: hooks, parametrisations, FSDP2."""

from __future__ import annotations

import copy
import socket
import warnings

import fsdp_ranks
import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

PROGRAM = "torch"


class Through(nn.Module):
    """Passes everything through."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("name", ["query_proj", "query_norm", "shared"])
def test_wrapping_a_submodule_changes_nothing(layer, run_layer, name):
    """A module that passes everything through around `query_proj`, `query_norm` or the shared branch"""
    expected = run_layer(layer)
    if getattr(layer, name, None) is None:
        return
    setattr(layer, name, Through(layer.get_submodule(name)))
    assert torch.equal(run_layer(layer), expected)


@pytest.mark.parametrize("name", ["query_proj", "query_norm", "shared"])
def test_wrapping_a_submodule_changes_nothing_in_training(layer, x, name):
    """The same module around them in training: gradients and statistics stay"""
    if getattr(layer, name, None) is None:
        return
    wrapped = copy.deepcopy(layer)
    setattr(wrapped, name, Through(wrapped.get_submodule(name)))
    for module in (layer, wrapped):
        module.train()(x).square().sum().backward()
    for plain, own in zip(layer.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(plain.grad, own.grad)
    for plain, own in zip(layer.buffers(), wrapped.buffers(), strict=True):
        assert torch.equal(plain, own)


@pytest.mark.parametrize("kind", ["forward", "pre-forward", "full backward", "state dict"])
@pytest.mark.parametrize("name", ["query_proj", "query_norm"])
def test_hooks_fire(layer, x, name, kind):
    """Forward, pre-forward and backward hooks on `query_proj` and `query_norm` fire"""
    seen = []
    module = layer.get_submodule(name)
    if isinstance(module, nn.Identity):
        return
    if kind == "forward":
        module.register_forward_hook(lambda *_: seen.append(1))
    elif kind == "pre-forward":
        module.register_forward_pre_hook(lambda *_: seen.append(1))
    elif kind == "full backward":
        module.register_full_backward_hook(lambda *_: seen.append(1))
    else:
        module.register_state_dict_post_hook(lambda *_: seen.append(1))
        layer.state_dict()
        assert len(seen) == 1
        return
    if kind == "full backward":
        layer(x.requires_grad_()).sum().backward()
        layer(x[:4]).sum().backward()
    else:
        with torch.no_grad():
            layer(x)
            layer(x[:4])
    assert len(seen) == 2


def test_a_hook_may_change_what_a_submodule_gives(make_layer, run_layer, assert_close):
    """A forward hook on `query_proj` that returns another tensor, and a global module hook"""
    twice = make_layer("peer-no-norm")
    with torch.no_grad():
        twice.query_proj.weight.mul_(2)
    layer = make_layer("peer-no-norm")
    with layer.query_proj.register_forward_hook(lambda module, args, output: output * 2):
        assert_close(run_layer(layer), run_layer(twice))

    def double(module, args, output):
        return output * 2 if module is layer.query_proj else None

    with nn.modules.module.register_module_forward_hook(double):
        assert_close(run_layer(layer), run_layer(twice))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_parametrised_weights(layer, run_layer, assert_close):
    """`parametrize` on `query_proj.weight` and `keys1`"""
    doubled = copy.deepcopy(layer)
    names = {"query_proj": "weight", "": "keys1"}
    with torch.no_grad():
        for module, name in names.items():
            getattr(doubled.get_submodule(module), name).mul_(2)
    expected = run_layer(doubled)
    for module, name in names.items():
        parametrize.register_parametrization(layer.get_submodule(module), name, Doubled())
    assert_close(run_layer(layer), expected)
    for module, name in names.items():
        parametrize.remove_parametrizations(layer.get_submodule(module), name)
    assert_close(run_layer(layer), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    ],
    ids=["spectral_norm", "weight_norm", "orthogonal", "prune"],
)
def test_weights_computed_from_others(layer, run_layer, assert_close, x, wrap):
    """`spectral_norm`, `weight_norm`, `orthogonal` and pruning of `query_proj`"""
    plain = copy.deepcopy(layer)
    wrap(layer.query_proj).eval()
    plain.query_proj.weight = nn.Parameter(layer.query_proj.weight.detach().clone())
    assert_close(run_layer(layer), run_layer(plain))
    layer(x).square().sum().backward()
    trained = [p for p in layer.query_proj.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    with torch.no_grad():  # a step moves the weight that is computed
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    plain.query_proj.weight = nn.Parameter(layer.query_proj(torch.eye(64)).detach().T.contiguous())
    assert_close(run_layer(layer), run_layer(plain), torch.bfloat16)


def test_another_projection_with_a_bias(layer, run_layer, x):
    """`query_proj` replaced by a linear layer with a bias, or by a network"""
    before = run_layer(layer)
    with torch.no_grad():
        bias = torch.randn(32)
        weight = layer.query_proj.weight
        layer.query_proj = nn.Linear(64, 32)
        layer.query_proj.weight.copy_(weight)
        layer.query_proj.bias.copy_(bias)
    after = run_layer(layer)
    assert not torch.allclose(after, before, atol=1e-3)
    layer.query_proj = nn.Sequential(layer.query_proj)
    assert torch.equal(run_layer(layer), after)


def test_dynamic_quantisation(layer, run_layer):
    """`torch.ao.quantization.quantize_dynamic`: `query_proj` in int8"""
    before = run_layer(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        layer = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert type(layer.query_proj) is not nn.Linear
    # The scale of a batch's activations is the batch's own: few tokens have others.
    with torch.no_grad():
        error = (layer(torch.zeros(3, 64) + 0.5) - layer(torch.zeros(24, 64) + 0.5)[:3]).abs().max()
    assert error <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("names", [["query_proj.weight"], ["keys1", "keys2"], ["experts"]])
def test_functional_call(make_layer, run_layer, x, assert_close, names):
    """`torch.func.functional_call` with other weights"""
    layer, other = make_layer(), make_layer()
    with torch.no_grad():
        for name in names:
            other.get_parameter(name).copy_(torch.randn_like(other.get_parameter(name)) / 8)
    weights = {name: other.get_parameter(name) for name in names}
    with torch.no_grad():
        for count in (24, 4):
            assert_close(torch.func.functional_call(layer, weights, (x[:count],)), other(x[:count]))


def test_weights_of_another_subclass(make_layer, run_layer):
    """Weights and tokens of a tensor subclass"""

    class Own(torch.Tensor):
        pass

    expected = run_layer(make_layer())
    layer = make_layer()
    for module, name in [(layer.query_proj, "weight"), (layer, "keys1"), (layer, "experts")]:
        setattr(module, name, nn.Parameter(getattr(module, name).detach().as_subclass(Own)))
    assert torch.equal(run_layer(layer).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize(
    "replacement", [torch.empty(0), torch.empty(3, 5), torch.empty(256, 2, 8, device="meta")]
)
@pytest.mark.parametrize(
    "name", ["query_proj.weight", "keys1", "keys2", "experts", "query_norm.running_mean"]
)
def test_emptied_weights_are_an_error(make_layer, x, name, replacement):
    """Weights emptied, of another shape or on the meta device: an error, not the end of the process"""
    layer = make_layer()
    module, _, own = name.rpartition(".")
    if own == "running_mean":
        layer.query_norm.running_mean = replacement
    else:
        setattr(layer.get_submodule(module), own, nn.Parameter(replacement))
    for count in (24, 4):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            layer(x[:count])


@pytest.fixture(scope="module")
def sharded(make_layer, make_model, tmp_path_factory):
    """What each of two processes found with FSDP2, and the folder of the modules that it was given."""
    folder = tmp_path_factory.mktemp("fsdp")
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    cases = {kind: (make_layer(kind), x) for kind in ("peer", "peer-layer-norm", "memory-plus")}
    cases["model"] = make_model(), tokens
    torch.save(cases, folder / "cases.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(fsdp_ranks.start, (2, port, str(folder)), nprocs=2)
    return folder


def check_sharded(folder, case, assert_close):
    module, tokens = torch.load(folder / "cases.pt", weights_only=False)[case]
    expected = fsdp_ranks.run(module, tokens)
    for rank in range(2):
        found = torch.load(folder / str(rank))[case]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if value.is_floating_point():
                assert_close(found[name], value)
            else:
                assert torch.equal(found[name], value)


@pytest.mark.parametrize("kind", ["peer", "peer-layer-norm", "memory-plus"])
def test_a_sharded_layer(sharded, assert_close, kind):
    """FSDP2 (`fully_shard`) of a layer over two processes: outputs, statistics, gradients of one process"""
    check_sharded(sharded, kind, assert_close)


def test_a_sharded_model(sharded, assert_close):
    """FSDP2 of a model, block by block, over two processes: logits, and the losses of three steps"""
    check_sharded(sharded, "model", assert_close)
