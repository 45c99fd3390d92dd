"""Parameter groups: every trained parameter once, in the group whose rates are meant for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from million_experts import PEER
from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.optim import parameter_groups

PEER_ARGUMENTS = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8}


@pytest.fixture(autouse=True)
def _quick_initialisation(monkeypatch):
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**12)


def make_model(**settings):
    return PeerForCausalLM(
        PeerConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_layer_types=["dense", "peer"],
            peer=PEER_ARGUMENTS,
            dense={"width": 32},
            **settings,
        )
    )


def names_by_group(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_the_group_of_its_kind_once(tied):
    model = make_model(tie_word_embeddings=tied)
    groups = parameter_groups(model, 1e-3, 4e-3, weight_decay=0.1, table_weight_decay=0.01)
    matrices, vectors, tables = names_by_group(model, groups)
    assert tables == {"model.layers.1.mlp.experts"}
    assert {"model.layers.1.mlp.keys1", "model.layers.1.mlp.query_proj.weight"} <= matrices
    assert "model.embed_tokens.weight" in matrices
    assert ("lm_head.weight" in matrices) == (not tied)
    assert {"model.norm.weight", "model.layers.1.mlp.query_norm.weight"} <= vectors
    assert all(model.get_parameter(name).dim() == 1 for name in vectors)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0), (4e-3, 0.01)]
    torch.optim.AdamW(groups)  # refuses a parameter in two groups


def test_tables_take_the_common_rate_unless_told_otherwise():
    groups = parameter_groups(make_model(), 1e-3)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.0)] * 3
    assert parameter_groups(make_model(), 1e-3, 0.0)[2]["lr"] == 0.0
    assert not any("betas" in group for group in groups)


def test_what_retrieves_may_have_a_rate_of_its_own():
    model = make_model()
    groups = parameter_groups(model, 1e-3, weight_decay=0.1, retrieval_learning_rate=2e-4)
    matrices, _, _, retrieval = names_by_group(model, groups)
    assert retrieval == {f"model.layers.1.mlp.{name}" for name in ("query_proj.weight", "keys1", "keys2")}
    assert not matrices & retrieval
    assert (groups[3]["lr"], groups[3]["weight_decay"]) == (2e-4, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len(parameter_groups(torch.nn.Linear(2, 2), 1e-3, retrieval_learning_rate=2e-4)) == 2


def test_tables_may_have_betas_of_their_own():
    groups = parameter_groups(make_model(), 1e-3, table_betas=(0.0, 0.9))
    assert [group["betas"] for group in torch.optim.AdamW(groups, betas=(0.9, 0.95)).param_groups] == [
        (0.9, 0.95),
        (0.9, 0.95),
        (0.0, 0.9),
    ]


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = parameter_groups(model, 1e-3)
    assert all(p.requires_grad for group in groups for p in group["params"])
    assert "model.embed_tokens.weight" not in names_by_group(model, groups)[0]
    model.get_parameter("model.layers.1.mlp.experts").requires_grad_(False)
    assert len(parameter_groups(model, 1e-3)) == 2
    model.requires_grad_(False)
    assert parameter_groups(model, 1e-3) == []


def test_a_table_that_layers_share_is_counted_once():
    first, second = PEER(16, **PEER_ARGUMENTS), PEER(16, **PEER_ARGUMENTS)
    second.experts = first.experts
    model = nn.ModuleDict({"first": first, "second": second, "head": nn.Linear(16, 3)})
    groups = parameter_groups(model, 1e-3)
    assert [p is first.experts for p in groups[2]["params"]] == [True]
    assert names_by_group(model, groups)[1] >= {"head.bias"}


def test_a_model_without_experts_has_two_groups():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    groups = parameter_groups(model, 1e-3, 4e-3, weight_decay=0.1)
    assert names_by_group(model, groups) == [{"0.weight"}, {"0.bias", "1.weight", "1.bias"}]
