"""Models whose weights lie on a disk, in whole or in part, compute what they compute in memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import dispatch_model
from packaging.version import Version

from million_experts.models import PeerConfig, PeerForCausalLM

IDS = torch.arange(20)[None]
MAPS = [["disk", "disk", "disk"], ["cpu", "disk", "disk"], ["disk", "cpu", "disk"]]


@pytest.fixture(autouse=True)
def _quick_initialisation(monkeypatch):
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)


def make(kind: str, **config) -> PeerForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8}
    return PeerForCausalLM(
        PeerConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_layer_types=kind,
            **{kind: sizes if kind in ("peer", "pkm", "memory_plus") else {}}, **config,
        )
    ).eval()  # fmt: skip


def places(blocks: list[str], **others: str) -> dict[str, str]:
    whole = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return whole | {f"model.layers.{i}": place for i, place in enumerate(blocks)} | others


def loaded(model: PeerForCausalLM, device_map: dict[str, str], folder) -> PeerForCausalLM:
    model.save_pretrained(folder / "model")
    return PeerForCausalLM.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=folder / "offload"
    ).eval()


@pytest.mark.parametrize("kind", ["dense", "peer", "moe", "expert_choice", "pkm", "memory_plus"])
@pytest.mark.parametrize("blocks", MAPS, ids="-".join)
@pytest.mark.parametrize("way", ["from_pretrained", "dispatch_model"])
def test_blocks_on_a_disk(kind, blocks, way, tmp_path):
    model = make(kind)
    expected = model(IDS).logits
    if way == "dispatch_model":
        placed = dispatch_model(model, places(blocks), main_device="cpu", offload_dir=tmp_path)
    elif kind == "memory_plus" and len(set(blocks)) > 1:
        message = (
            "device_map must keep model.layers.0.mlp, model.layers.1.mlp, model.layers.2.mlp together: they "
            f"share values, got {', '.join(blocks)}"
        )
        with pytest.raises(ValueError, match=message):
            loaded(model, places(blocks), tmp_path)
        return
    elif kind == "memory_plus" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("older versions of transformers lose a shared tensor that lies on a disk")
    else:
        placed = loaded(model, places(blocks), tmp_path)
    assert any(p.is_meta for p in placed.model.layers[blocks.index("disk")].parameters())
    for _ in range(2):
        assert torch.equal(placed(IDS).logits, expected)


def test_a_tied_output_layer_stays_with_the_embeddings(tmp_path):
    model = make("peer", tie_word_embeddings=True)
    device_map = places(["cpu"] * 3, lm_head="disk")
    with pytest.raises(
        ValueError, match=r"keep model.embed_tokens, lm_head together: they share weight, got cpu"
    ):
        loaded(model, device_map, tmp_path)
