"""The dense feed-forward against the same maps written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from million_experts.layers import DenseFeedForward
from million_experts.ops import ACTIVATIONS

FUNCTIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,)])
def test_is_two_maps_or_three(activation, glu, lead, assert_close):
    layer = DenseFeedForward(5, 11, activation, glu).double()
    x = torch.randn(*lead, 5, dtype=torch.float64)
    state = layer.state_dict()
    hidden = FUNCTIONS[activation](x @ state["down.weight"].T)
    if glu:
        hidden = hidden * (x @ state["gate.weight"].T)
    assert_close(layer(x), hidden @ state["up.weight"].T)


@pytest.mark.parametrize("glu", [False, True])
def test_names_and_shapes_of_the_state(glu):
    state = {name: tuple(t.shape) for name, t in DenseFeedForward(5, 11, glu=glu).state_dict().items()}
    expected = {"down.weight": (11, 5), "up.weight": (5, 11)} | ({"gate.weight": (11, 5)} if glu else {})
    assert state == expected


def test_default_width_keeps_the_number_of_parameters():
    assert DenseFeedForward(96).width == 384
    assert DenseFeedForward(96, glu=True).width == 256
    assert DenseFeedForward(100, glu=True).width == 272  # 266.7 in multiples of 8
    plain, gated = (sum(p.numel() for p in DenseFeedForward(96, glu=g).parameters()) for g in (False, True))
    assert plain == gated


def test_weights_keep_unit_variance():
    torch.manual_seed(0)
    layer = DenseFeedForward(64, 4096, glu=True)
    for linear in (layer.down, layer.gate, layer.up):
        # The standard deviation of 262,144 numbers is known to 0.14 %.
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.01)
    x = torch.randn(500, 64)
    assert layer.down(x).std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, r"dim must be a positive int, got 0"),
        ({"width": -2}, r"width must be a positive int, got -2"),
        ({"width": 2.0}, r"width must be a positive int, got 2\.0"),
        ({"activation": "tanh"}, r"activation must be one of 'gelu', 'relu', 'silu', got 'tanh'"),
    ],
)
def test_arguments_outside_what_is_allowed_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseFeedForward(**({"dim": 4} | arguments))


@pytest.mark.parametrize("shape", [(), (4,), (5, 4)])
def test_tokens_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \[..., 5\], got \["):
        DenseFeedForward(5)(torch.zeros(shape))
