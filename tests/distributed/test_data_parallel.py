"""Several ranks compute what one process does with all their tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import ranks

from million_experts import PEER

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.mark.parametrize("world", [2, 3])
def test_row_gradients_are_exchanged(world, tmp_path):
    found = ranks.run(ranks.exchange, world, tmp_path)
    for case in ranks.EXCHANGES:
        own = [ranks.row_gradient(rank, case) for rank in range(world)]
        if case == "nobody":
            assert all(of_rank[case] is None for of_rank in found)
            continue
        mean = sum(grad.to_dense() for grad in own if grad is not None) / world
        touched = torch.cat([grad._indices()[0] for grad in own if grad is not None]).unique()
        for of_rank in found:
            grad = of_rank[case]
            assert grad.is_coalesced()
            assert grad.indices()[0].equal(touched)
            torch.testing.assert_close(grad.to_dense(), mean)
            assert grad.values().equal(found[0][case].values()), "ranks must not drift apart"
    assert all("gradient of 0.experts must be sparse" in of_rank["error"] for of_rank in found)


def test_query_norm_over_ranks_is_that_of_one_process(tmp_path):
    world = 2
    expected = ranks.norm(0, world, one_process=True)
    found = ranks.run(ranks.norm, world, tmp_path)
    for batch in range(4):
        for name in (f"y {batch}", f"dx {batch}"):
            together = torch.cat([of_rank[name] for of_rank in found])
            torch.testing.assert_close(together, expected[name], rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        together = sum(of_rank[name] for of_rank in found)
        torch.testing.assert_close(together, expected[name], rtol=1e-4, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for of_rank in found:
            torch.testing.assert_close(of_rank[name], expected[name])
            assert of_rank[name].equal(found[0][name])
    assert all("at least two real tokens" in of_rank["error"] for of_rank in found)


def test_ranks_train_as_one_process(tmp_path):
    """Accumulation and clipping included, and a rank whose tokens are all masked."""
    world = 2
    expected = ranks.train(0, world, one_process=True)
    found = ranks.run(ranks.train, world, tmp_path)
    assert (expected["norms"] > 0.5).all(), "otherwise nothing is clipped"
    for name, tensor in expected.items():
        for of_rank in found:
            torch.testing.assert_close(of_rank[name], tensor, rtol=1e-4, atol=1e-5)
            assert of_rank[name].equal(found[0][name]), "ranks must not drift apart"


def test_a_rank_with_padding_alone(tmp_path):
    torch.manual_seed(0)
    layer = PEER(ranks.D, ranks.N, 2, 4, 4)
    x, mask, dy = ranks.tokens(2)
    (layer(x[2, :6], mask[2, :6]) * dy[2, :6]).sum().backward()
    found = ranks.run(ranks.padding, 2, tmp_path)
    for synchronised in (False, True):
        for name, parameter in layer.named_parameters():
            for of_rank in found:  # the mean over ranks, of which one gives nothing
                torch.testing.assert_close(of_rank[f"{synchronised} {name}"], parameter.grad / 2)
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(found[0][f"{synchronised} {name}"], buffer)
    assert found[1]["False query_norm.num_batches_tracked"] == 0
    assert not found[1]["False query_norm.running_mean"].any()
    assert found[1]["True query_norm.running_mean"].equal(found[0]["True query_norm.running_mean"])
