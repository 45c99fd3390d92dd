"""PeerConfig: what it accepts, refuses, stores and merges."""

import copy
import dataclasses
import json
import pickle

import pytest
from transformers import AutoConfig

from million_experts.models import FEED_FORWARDS, PeerConfig
from million_experts.models.feed_forwards import FeedForwardKind


@pytest.mark.parametrize(("layers", "middle"), [(1, 0), (2, 1), (3, 1), (4, 2), (12, 6)])
def test_the_middle_block_is_peer_by_default(layers, middle):
    kinds = PeerConfig(num_hidden_layers=layers).mlp_layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "peer"] == [middle]
    assert set(kinds) <= {"peer", "dense"}


def test_one_string_stands_for_all_layers_and_only_its_dict_is_filled():
    config = PeerConfig(num_hidden_layers=3, mlp_layer_types="dense")
    assert config.mlp_layer_types == ["dense"] * 3
    assert config.dense["activation"] == "gelu"
    assert config.peer is None


def test_arguments_are_completed_so_that_a_stored_configuration_outlives_a_changed_default(
    tiny_config, tmp_path, monkeypatch
):
    tiny_config().save_pretrained(tmp_path)
    changed = FeedForwardKind(FEED_FORWARDS["peer"].layer, {"activation": "relu"})
    monkeypatch.setitem(FEED_FORWARDS, "peer", changed)
    assert tiny_config().peer["activation"] == "relu"
    assert PeerConfig.from_pretrained(tmp_path).peer["activation"] == "gelu"


def test_every_kind_has_a_field():
    assert set(FEED_FORWARDS) <= {field.name for field in dataclasses.fields(PeerConfig)}


def test_the_callers_dicts_are_left_alone(tiny_config):
    peer, rope = {"num_experts": 64, "experts_per_head": 4}, {"rope_theta": 500.0}
    config = PeerConfig(peer=peer, rope_parameters=rope)
    assert (peer, rope) == ({"num_experts": 64, "experts_per_head": 4}, {"rope_theta": 500.0})
    assert config.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp_layer_types": ["peer"]}, "1 entries for num_hidden_layers=2"),
        (
            {"mlp_layer_types": "pear"},
            "no kind 'pear'; did you mean 'peer'.*"
            "allowed: dense, expert_choice, memory_plus, moe, peer, pkm, swiglu",
        ),
        ({"mlp_layer_types": []}, "0 entries"),
        ({"peer": {"num_expert": 64}}, "'num_expert'; did you mean 'num_experts'.*allowed: activation"),
        ({"dense": {"dim": 16}}, "dense: DenseFeedForward has no argument 'dim'"),
        ({"peer": {"num_experts": 67}}, "num_experts"),
        ({"peer": {"experts_per_head": 9}}, "experts_per_head"),
        ({"peer": {"score": "softmin"}}, "score"),
        ({"dense": {"activation": "swish"}}, "activation"),
        ({"hidden_size": 18, "num_attention_heads": 4}, "multiple of num_attention_heads"),
        ({"hidden_size": 6}, "even"),
        ({"num_attention_heads": 2, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"num_experts": 64}, r"give peer=dict\(num_experts=...\)"),
        ({"width": 64}, r"give dense=dict\(width=...\)"),
    ],
)
def test_mistakes_are_refused_at_construction(tiny_config, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_a_backend_that_cannot_run_here_does_not_hinder_reading(tiny_config):
    assert tiny_config(peer={"backend": "triton"}).peer["backend"] == "triton"


def test_saving_and_loading_gives_an_equal_configuration(tiny_config, tmp_path):
    config = tiny_config(
        peer={"num_experts": (16, 8)},
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
        eos_token_id=[3, 4],
    )
    config.save_pretrained(tmp_path)
    for loaded in (PeerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        loaded._name_or_path = config._name_or_path
        loaded.transformers_version = config.transformers_version
        assert loaded == config
        assert loaded.peer["num_experts"] == (16, 8)
    json.loads(config.to_json_string())


def test_a_dict_given_on_loading_is_merged(tiny_config, tmp_path):
    tiny_config(peer={"num_experts": (16, 8)}).save_pretrained(tmp_path)
    for load in (PeerConfig.from_pretrained, AutoConfig.from_pretrained):
        config = load(tmp_path, peer={"backend": "reference"}, use_cache=False)
        assert config.peer == {**tiny_config(peer={"num_experts": (16, 8)}).peer, "backend": "reference"}
        assert config.dense["width"] == 32
        assert not config.use_cache


def test_changes_on_loading_are_checked_and_unknown_ones_returned(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_expertz"):
        PeerConfig.from_pretrained(tmp_path, peer={"num_expertz": 64})
    with pytest.raises(ValueError, match="2 entries for num_hidden_layers=3"):
        PeerConfig.from_pretrained(tmp_path, num_hidden_layers=3)
    _, unused = PeerConfig.from_pretrained(
        tmp_path, peer={"glu": True}, colour="red", return_unused_kwargs=True
    )
    assert unused == {"colour": "red"}


def test_copies_and_pickles_are_equal(tiny_config):
    config = tiny_config()
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
