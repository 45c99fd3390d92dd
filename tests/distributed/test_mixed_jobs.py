"""Every kind of decoder in jobs of several ranks that others start: DDP and `fully_shard`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import decoder_ranks
import ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, by job."""
    return ranks.run(decoder_ranks.jobs, 2, tmp_path_factory.mktemp("jobs"))


def test_a_table_that_blocks_share_trains_as_in_one_process(found):
    expected = decoder_ranks.shared_table(0, 2, one_process=True)
    found = [of_rank["shared_table"] for of_rank in found]
    for of_rank in found:
        message = of_rank.pop("forgotten")
        assert "take_tables_from_ddp(model)" in message
        assert "LanguageModelTrainer" in message
        assert of_rank.keys() == expected.keys()
    assert sum(name.endswith("mlp.values") for name in expected) == 1
    for name, tensor in expected.items():
        for of_rank in found:
            torch.testing.assert_close(of_rank[name], tensor, rtol=1e-4, atol=1e-5)
            assert of_rank[name].equal(found[0][name]), "ranks must not drift apart"


def test_a_rank_that_holds_padding_alone_takes_part(found):
    for of_rank in (of_rank["padding_alone"] for of_rank in found):
        assert of_rank.keys() == decoder_ranks.KINDS.keys()
        for gradients in of_rank.values():
            assert any(expected.any() for _, expected in gradients.values())
            for gradient, expected in gradients.values():
                torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_fully_shard_by_blocks(found):
    for of_rank in (of_rank["sharded"] for of_rank in found):
        for kind in decoder_ranks.KINDS:
            if kind != "memory_plus":
                expected = of_rank[f"{kind} in one process"]
                assert of_rank[f"{kind} by blocks"] == pytest.approx(expected, rel=1e-4)
        # PyTorch says what belongs together, and so it works.
        assert "model.layers.1.mlp.values' is shared" in of_rank["memory_plus by blocks"]
        assert "fully_shard([module_a, module_b])" in of_rank["memory_plus by blocks"]
        together = of_rank["memory_plus with its memories together"]
        assert together == pytest.approx(of_rank["memory_plus in one process"], rel=1e-4)
        for kind in ("peer", "pkm"):
            message = of_rank[f"{kind} with sparse gradients"]
            assert "fully_shard does not exchange sparse gradients" in message
            assert "sparse_grad=False" in message
