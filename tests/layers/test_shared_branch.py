"""PEER(shared_width=...): a dense branch beside the experts, which changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from million_experts import PEER
from million_experts.layers import DenseFeedForward

MASK = torch.tensor([True, False, True, True, False, True, False])


def parts(layer: PEER) -> tuple[PEER, DenseFeedForward]:
    """The experts alone, and the branch alone, with parameters of their own."""
    alone = copy.deepcopy(layer)
    branch = alone.shared
    alone.shared = None
    return alone, branch


def gradients(*modules: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for module in modules for p in module.parameters()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("glu", "activation"), [(False, "gelu"), (True, "silu")])
@pytest.mark.parametrize("with_mask", [True, False])
def test_the_output_is_the_sum_of_both(
    make_layer, assert_close, training, glu, activation, with_mask, backend
):
    layer = make_layer(shared_width=11, glu=glu, activation=activation, backend=backend).train(training)
    alone, branch = parts(layer)
    x, weights = torch.randn(2, 7, 5, dtype=torch.float64)
    mask = MASK if with_mask else torch.ones_like(MASK)
    if with_mask:
        x[~MASK], weights[~MASK] = float("nan"), float("nan")
    xs = [x.clone().requires_grad_() for _ in range(2)]
    y = layer(xs[0], mask=mask)
    real = torch.where(mask[:, None], xs[1], 0)
    expected = alone(xs[1], mask=mask) + torch.where(mask[:, None], branch(real), 0)
    assert_close(y, expected)
    for output in (y, expected):
        output.backward(weights)
    assert_close(xs[0].grad, xs[1].grad)
    names = [name for name, _ in layer.named_parameters()]
    assert [n for n in names if n.startswith("shared.")] == [
        f"shared.{n}" for n, _ in branch.named_parameters()
    ]
    for ours, theirs in zip(gradients(layer), gradients(alone, branch), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_inference_on_few_tokens_has_the_branch_too(make_layer, assert_close, tokens):
    layer = make_layer(shared_width=11).float().eval()
    x = torch.randn(tokens, 5)
    expected = layer.double()(x.double())
    layer.float()
    with torch.no_grad():
        assert_close(layer(x), expected)
        assert_close(layer(x, return_routing=True)[0], expected)
        assert not layer(x, mask=torch.zeros(tokens, dtype=torch.bool)).any()


def test_the_state_without_a_branch_is_as_ever(make_layer):
    without = make_layer().state_dict()
    assert not any(name.startswith("shared") for name in without)
    with_branch = make_layer(shared_width=11, glu=True).state_dict()
    names = {"shared.down.weight", "shared.gate.weight", "shared.up.weight"}
    assert with_branch.keys() - without.keys() == names


@pytest.mark.parametrize("settings", [{}, {"glu": True, "activation": "relu"}, {"init_std": 0.5}], ids=str)
def test_the_output_starts_with_the_standard_deviation_asked_for(monkeypatch, settings):
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**17)
    torch.manual_seed(0)
    layer = PEER(16, 400, 4, 4, 8, shared_width=48, **settings)
    alone, branch = parts(layer)
    x = torch.randn(2**15, 16)
    with torch.no_grad():
        both, experts, dense = (part(x).square().mean().sqrt().item() for part in (layer, alone, branch))
    assert both == pytest.approx(layer.init_std, rel=0.05)
    assert experts == pytest.approx(dense, rel=0.05)  # an equal share of the output for each


def test_other_dtypes(make_layer):
    layer = make_layer(shared_width=11).float()
    x = torch.randn(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.bfloat16()(x).dtype == torch.float32


@pytest.mark.parametrize("width", [-1, 2.0, True])
def test_a_width_that_is_none_is_refused(width):
    with pytest.raises(ValueError, match=f"shared_width must be an int, 0 or more, got {width}"):
        PEER(8, 16, 1, 1, 4, shared_width=width)
