"""What the figures show, and that they are pictures."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
import torch

from million_experts import PEER, ExpertUsage
from million_experts.lm import figures
from million_experts.lm.figures import loss_figure, resources_figure, usage_figure

HISTORY = [
    {"step": 1, "loss": 6.0},
    {"step": 2, "loss": 5.0},
    {"step": 2, "eval_loss": 5.5},
    {"step": 3, "loss": 4.0},
    {"step": 4, "loss": 3.0},
    {"step": 4, "eval_loss": 3.5},
    {"step": 4, "expert_usage/x": 0.5},
    {"step": 4, "train_runtime": 9.0},
]
YARDSTICKS = {"unigram": 2.5, "interpolated bigram": 1.5, "test, this model": 1.25}


@pytest.fixture
def drawn(monkeypatch):
    """The figures, as they are when they are saved."""
    kept = []
    save = figures.save_figure

    def keep(figure, path):
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", keep)
    return kept


def lines_of(axes):
    return {line.get_label(): np.column_stack(line.get_data()) for line in axes.lines}


def assert_picture(path, least=20):
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert 400 < height < 2000
    assert 800 < width < 8000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > least, "an empty picture"


def test_loss_is_drawn_in_bits_per_byte_with_its_yardsticks(tmp_path, drawn):
    loss_figure(HISTORY, 0.5, YARDSTICKS, "title", tmp_path / "loss.png")
    assert_picture(tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    lines = lines_of(axes)
    assert lines["training"].tolist() == [[1, 3.0], [2, 2.5], [3, 2.0], [4, 1.5]]
    assert lines["validation"].tolist() == [[2, 2.75], [4, 1.75]]
    for label, value in YARDSTICKS.items():
        assert lines[f"{label}: {value:.3f}"][:, 1].tolist() == [value, value]
    bottom, top = axes.get_ylim()
    assert bottom < 1.25
    assert top > 2.75
    assert axes.get_ylabel() == "bits per byte"
    assert axes.get_title() == "title"


@pytest.mark.parametrize(
    ("history", "yardsticks"),
    [([], {}), ([{"step": 1, "loss": 4.0}], YARDSTICKS), ([{"step": 5, "eval_loss": 4.0}], {})],
    ids=["nothing", "training", "validation"],
)
@pytest.mark.filterwarnings("error")
def test_a_short_history_is_drawn_too(tmp_path, history, yardsticks):
    loss_figure(history, 0.5, yardsticks, "title", tmp_path / "loss.png")
    assert_picture(tmp_path / "loss.png", least=5)


@pytest.fixture
def usages():
    torch.manual_seed(0)
    layers = [PEER(8, 64, num_heads=h, experts_per_head=4, key_dim=8, query_norm="layer") for h in (1, 3)]
    with ExpertUsage(layers[0]) as first, ExpertUsage(layers[1]) as second, torch.no_grad():
        for layer in layers:
            layer(torch.randn(50, 8))
    return {"one": first, "two": second}


def test_usage_is_drawn_by_layer_and_head(tmp_path, drawn, usages):
    usage_figure(usages, "heading", tmp_path / "usage.png")
    assert_picture(tmp_path / "usage.png")
    for axes, (name, usage) in zip(drawn[0].axes, usages.items(), strict=True):
        lines = lines_of(axes)
        shares = usage.shares().sort(descending=True).values
        used = shares[shares > 0].numpy()
        curve = lines["all heads"]
        assert curve[0].tolist() == [1, used[0]]
        assert curve[-1].tolist() == [len(used), used[-1]]
        assert (np.diff(curve[:, 1]) <= 0).all()
        assert lines["uniform"][:, 1].tolist() == [1 / 64, 1 / 64]
        heads = [line for line in axes.lines if line.get_label().startswith("_")]
        assert len(heads) == usage.layer.num_heads
        assert name in axes.get_title()
        assert f"{usage.figures().usage:.1%} used" in axes.get_title()


def test_a_single_expert_and_a_million_are_drawn(tmp_path, drawn, usages):
    usage = usages["one"]
    usage.mass.zero_()
    usage.mass[0, 7] = 2.0
    usage_figure({"x": usage}, "heading", tmp_path / "one.png")
    assert lines_of(drawn[0].axes[0])["all heads"].tolist() == [[1, 1.0]]
    usage.mass = torch.rand(1, 1024**2, dtype=torch.float64)
    usage_figure({"x": usage}, "heading", tmp_path / "many.png")
    assert len(lines_of(drawn[1].axes[0])["all heads"]) <= 400
    assert_picture(tmp_path / "many.png")


def test_figures_are_closed(tmp_path, usages):
    usage_figure(usages, "heading", tmp_path / "usage.png")
    assert figures.plt.get_fignums() == []


def test_speed_and_memory_are_drawn_over_steps(tmp_path, drawn):
    history = [
        {"step": 10, "loss": 3.0, "seconds_per_step": 2.0, "memory_gb": 1.5},
        {"step": 10, "eval_loss": 3.0},
        {"step": 20, "loss": 2.0, "seconds_per_step": 0.5, "memory_gb": 2.5},
    ]
    resources_figure(history, 100, "title", tmp_path / "resources.png")
    assert_picture(tmp_path / "resources.png")
    speed, memory = (axes.lines[0].get_xydata().tolist() for axes in drawn[0].axes)
    assert speed == [[10, 50], [20, 200]]
    assert memory == [[10, 1.5], [20, 2.5]]
    resources_figure([{"step": 1, "loss": 3.0}], 100, "title", tmp_path / "empty.png")
