"""At step 0 the output has the standard deviation that was asked for, whatever the layer looks like."""

from __future__ import annotations

import pytest
import torch

from million_experts import PEER

# Each setting that could matter, in many company: pools, heads, experts a head, widths, scores, norms.
GRID = [
    {},
    {"glu": True},
    {"num_experts": 4, "experts_per_head": 2},
    {"num_experts": (1, 1), "experts_per_head": 1},
    {"num_experts": 64**2, "num_heads": 1},
    {"num_experts": 64**2, "key_dim": 64, "share_keys": False},
    {"num_heads": 1, "experts_per_head": 1},
    {"num_heads": 1, "experts_per_head": 1, "glu": True, "activation": "relu"},
    {"num_heads": 8, "experts_per_head": 16, "dim": 64},
    {"num_heads": 8, "experts_per_head": 16, "dim": 64, "glu": True, "activation": "silu"},
    {"num_heads": 8, "experts_per_head": 8, "dim": 8, "glu": True, "query_norm": "none"},
    {"experts_per_head": 16, "num_experts": 256, "activation": "relu"},
    {"score": "sigmoid", "query_norm": "layer"},
    {"score": "sigmoid", "glu": True, "query_norm": "none", "activation": "relu"},
    {"score": "relu", "activation": "silu"},
    {"score": "relu", "glu": True, "query_norm": "layer", "share_keys": False},
    {"score": "relu", "num_heads": 1, "experts_per_head": 1, "query_norm": "none"},
    {"query_norm": "layer", "num_heads": 2, "key_dim": 2},
    {"query_norm": "none", "dim": 3},
    {"dim": 1, "num_heads": 1},
    {"dim": 33, "num_experts": (7, 40), "experts_per_head": 7},
]


@pytest.fixture(autouse=True)
def _quick_initialisation():
    """The real thing here, not the rough scale of the other tests."""


@pytest.fixture
def quick(monkeypatch):
    """For tests that care for something else than the scale."""
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)


def make(seed: int = 0, **settings) -> PEER:
    torch.manual_seed(seed)
    usual = {"dim": 16, "num_experts": 400, "num_heads": 4, "experts_per_head": 4, "key_dim": 8}
    return PEER(**{**usual, **settings})


@torch.no_grad()
def output_std(layer: PEER) -> float:
    """Measured in training mode on as many normal tokens as make it exact to 1 % (one standard error)."""
    layer.train()
    squares = torch.zeros(0, dtype=torch.float64)
    while True:
        x = torch.randn(4096, layer.dim)
        squares = torch.cat([squares, layer(x).double().square().mean(1)])
        # The root of a mean has half the mean's relative error.
        error = squares.std() / squares.mean() / len(squares) ** 0.5 / 2
        if error < 0.01:
            return squares.mean().sqrt().item()
        assert len(squares) < 2**19, "too heavy a tail to measure"


@pytest.mark.parametrize("settings", GRID, ids=str)
def test_output_has_the_standard_deviation_asked_for(settings):
    assert output_std(make(**settings)) == pytest.approx(0.01, rel=0.05)


def test_narrow_layer_of_many_experts_is_measured_on_enough_tokens():
    # The 128 neurons of a token vary together, with its norm: 1024 tokens would leave an error of 6 %.
    layer = make(dim=2, num_experts=256, num_heads=8, experts_per_head=16, glu=True)
    assert output_std(layer) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("init_std", [0.01, 2.0])
def test_another_standard_deviation_and_other_seeds(init_std, seed):
    assert output_std(make(seed, init_std=init_std)) == pytest.approx(init_std, rel=0.05)


def test_drawn_anew_in_eval_mode_it_is_still_right_for_training():
    # Without the normalisation by the batch the output of so narrow a layer differs by a third.
    layer = make(dim=2, num_heads=1, score="relu").eval()
    for seed in range(2):
        torch.manual_seed(seed)
        layer.eval().reset_parameters()
        assert not layer.training
        assert not layer.query_norm.training
        assert output_std(layer) == pytest.approx(0.01, rel=0.05)


@pytest.mark.usefixtures("quick")
def test_pre_activations_and_scores_have_unit_variance():
    layer = make(dim=64, num_experts=128**2, key_dim=64)
    x = torch.randn(2000, 64)
    down = layer.experts[:, 0]
    assert (x @ down[:2000].T).std().item() == pytest.approx(1, rel=0.02)
    queries = layer.query_proj(x).view(-1, 4, 2, 32)
    assert queries.std().item() == pytest.approx(1, rel=0.02)
    scores = queries[:, :, 0] @ layer.keys1.T + queries[:, :, 1] @ layer.keys2.T  # 128 of the 128^2 sums
    assert scores.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.usefixtures("quick")
def test_the_seed_decides():
    a, b, c = (make(seed).state_dict() for seed in (3, 3, 4))
    for name in a:
        assert torch.equal(a[name], b[name])
    for name in ("query_proj.weight", "keys1", "keys2", "experts"):
        assert not torch.equal(a[name], c[name])


@pytest.mark.usefixtures("quick")
def test_measuring_leaves_no_trace():
    calls = []
    layer = make()
    assert torch.equal(layer.query_norm.running_mean, torch.zeros(32))
    assert torch.equal(layer.query_norm.running_var, torch.ones(32))
    assert layer.query_norm.num_batches_tracked == 0
    assert all(p.grad is None and p.requires_grad for p in layer.parameters())
    assert layer.training

    layer.register_routing_hook(lambda *_: calls.append("routing"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer(torch.randn(20, 16))
    assert calls == ["routing", "forward"]
    layer.reset_parameters()
    assert calls == ["routing", "forward"]
    assert layer.query_norm.num_batches_tracked == 0
    assert torch.equal(layer.query_norm.running_var, torch.ones(32))
    layer(torch.randn(20, 16))
    assert calls == ["routing", "forward"] * 2


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
def test_on_the_meta_device_and_then_for_real(query_norm):
    with torch.device("meta"):
        layer = make(query_norm=query_norm, num_experts=2**40, key_dim=128)
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer.experts.shape == (2**40, 2, 16)

    with torch.device("meta"):
        layer = make(query_norm=query_norm)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert output_std(layer) == pytest.approx(0.01, rel=0.05)


def test_in_bfloat16_from_the_start():
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer = make(dim=32)
    finally:
        torch.set_default_dtype(default)
    assert layer.experts.dtype == torch.bfloat16
    assert output_std(layer) == pytest.approx(0.01, rel=0.05)
