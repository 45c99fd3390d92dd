"""Usage figures against shares worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from million_experts import ExpertUsage
from million_experts.layers import Routing

# Two heads, two experts a head, three tokens, of which the last is masked, and a pool of twelve.
INDICES = torch.tensor([[[0, 1], [0, 5]], [[1, 2], [5, 0]], [[7, 8], [7, 8]]])
GATES = torch.tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.5], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])


def feed(layer, indices, gates) -> None:
    for hook in list(layer._routing_hooks.values()):
        hook(layer, Routing(indices, gates, gates))


def test_figures_by_hand(make_layer):
    layer = make_layer()
    usage = ExpertUsage(layer)
    feed(layer, INDICES, GATES)
    # Mass: head 0 gives 0: 0.75, 1: 0.25 + 0.5, 2: 0.5; head 1 gives 0: 0.5 + 0, 5: 0.5 + 1.
    assert usage.tokens == 2
    z = torch.zeros(12, dtype=torch.float64)
    z[[0, 1, 2, 5]] = torch.tensor([1.25, 0.75, 0.5, 1.5], dtype=torch.float64) / 4
    assert torch.allclose(usage.shares(), z, rtol=1e-12, atol=0)
    figures = usage.figures()
    assert figures.usage == pytest.approx(4 / 12, rel=1e-12)
    entropy = -sum(p * math.log(p) for p in (0.3125, 0.1875, 0.125, 0.375))
    assert figures.unevenness == pytest.approx(math.log(12) - entropy, rel=1e-10)
    assert figures.top_share == pytest.approx(0.375, rel=1e-12)

    head = usage.figures(1)
    assert usage.shares(1)[[0, 5]].tolist() == [0.25, 0.75]
    assert head.usage == pytest.approx(2 / 12, rel=1e-12)
    assert head.unevenness == pytest.approx(
        math.log(12) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75), rel=1e-10
    )
    assert head.top_share == 0.75


def test_uniform_mass_is_perfectly_even(make_layer):
    layer = make_layer()
    usage = ExpertUsage(layer)
    feed(layer, torch.arange(12).view(3, 2, 2), torch.full((3, 2, 2), 0.5))
    figures = usage.figures()
    assert figures.usage == 1
    assert figures.unevenness == pytest.approx(0, abs=1e-12)
    assert figures.top_share == pytest.approx(1 / 12, rel=1e-12)


def test_mass_is_that_of_the_layers_routing(make_layer):
    layer = make_layer().eval()
    x, mask = torch.randn(2, 7, 5, dtype=torch.float64), torch.rand(2, 7) > 0.4
    x[~mask] = float("nan")
    with ExpertUsage(layer) as usage:
        _, first = layer(x, mask=mask, return_routing=True)
        _, second = layer(x.nan_to_num(), return_routing=True)
    expected = torch.zeros(2, 12, dtype=torch.float64)
    for routing, real in ((first, mask), (second, torch.ones_like(mask))):
        for index, gate in zip(routing.indices[real], routing.gates[real], strict=True):
            for head in range(2):
                for i, g in zip(index[head], gate[head], strict=True):
                    expected[head, i] += g.detach()
    assert torch.allclose(usage.mass, expected, rtol=1e-12, atol=1e-15)
    assert usage.tokens == mask.sum() + 14


def test_listens_until_closed(make_layer):
    layer = make_layer()
    x = torch.randn(7, 5, dtype=torch.float64)
    with ExpertUsage(layer) as inside:
        outside = ExpertUsage(layer)
        layer(x)
    layer(x)
    assert (inside.tokens, outside.tokens) == (7, 14)
    outside.close()
    layer(x)
    assert outside.tokens == 14
    assert not layer._routing_hooks
    assert inside.figures().usage > 0  # the mass stays


def test_closes_when_the_model_fails(make_layer):
    layer = make_layer()
    with pytest.raises(ValueError, match="x must have shape"), ExpertUsage(layer):
        layer(torch.zeros(3, 4))
    assert not layer._routing_hooks


def test_without_mass_there_are_no_figures(make_layer):
    layer = make_layer().eval()
    usage = ExpertUsage(layer)
    with pytest.raises(ValueError, match="no expert has received any gate mass"):
        usage.figures()
    layer(torch.zeros(3, 5, dtype=torch.float64), mask=torch.zeros(3, dtype=torch.bool))
    assert usage.tokens == 0
    with pytest.raises(ValueError, match="no expert has received any gate mass"):
        usage.shares(0)


def test_listening_changes_nothing(make_layer):
    layer = make_layer().eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    alone = layer(x)
    with ExpertUsage(layer):
        assert torch.equal(layer(x), alone)
