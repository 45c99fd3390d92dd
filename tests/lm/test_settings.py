"""Settings: every field documented, every wrong value refused by name; the presets are what they say."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import torch
import yaml

from million_experts.layers import PEER
from million_experts.lm.settings import (
    FIELD_TYPES,
    FREE_ON_RESUME,
    SECOND_MOMENTS,
    TABLE_SETTINGS,
    TrainSettings,
    load_preset,
    parse_yaml,
    preset_names,
)
from million_experts.lm.training import model_config
from million_experts.models import PeerForCausalLM
from million_experts.optim import rowwise_checks

PRESETS = ["demo", "million", "ostix360-test1", "ostix360-test2", "ostix360-test3", "paper-middle"]


def test_presets_are_those_that_are_documented():
    assert preset_names() == PRESETS


@pytest.mark.parametrize(
    ("name", "experts", "layers", "kinds"),
    [
        ("demo", 262144, 1, ["dense", "dense", "peer", "dense"]),
        ("ostix360-test1", 1296, 6, ["peer"] * 6),
        ("ostix360-test2", 900, 6, ["peer"] * 6),
        ("paper-middle", 1024**2, 1, ["dense"] * 4 + ["peer"] + ["dense"] * 3),
        ("million", 1024**2, 1, ["dense"] * 3 + ["peer"] + ["dense"] * 2),
    ],
)
def test_presets_describe_models_that_can_be_built(name, experts, layers, kinds):
    settings = load_preset(name)
    assert settings.output_dir == f"runs/{name}"
    config = model_config(settings, settings.vocab_size)
    assert config.mlp_layer_types == kinds
    with torch.device("meta"):
        model = PeerForCausalLM(config)
    found = [m for m in model.modules() if isinstance(m, PEER)]
    assert [layer.num_experts for layer in found] == [experts] * layers
    assert {name: getattr(found[0], name) for name in settings.peer if name != "query_norm"} == {
        name: value for name, value in settings.peer.items() if name != "query_norm"
    }
    assert found[0].glu == (name == "ostix360-test2")


def test_the_papers_setting_leaves_nothing_to_the_defaults():
    settings = load_preset("paper-middle")
    stated = {"num_experts": 1024**2, "num_heads": 8, "experts_per_head": 16, "query_norm": "batch"}
    form = {"share_keys": True, "score": "softmax", "glu": False}
    assert (stated | form).items() <= settings.peer.items()
    # Where the paper is silent: AdamW, one rate for all; what our studies found stays out of it.
    learning = [getattr(settings, name) for name in TABLE_SETTINGS]
    rate = settings.learning_rate
    assert learning == [rate, 0.0, 0.9, "element", rate]


def test_every_field_is_documented():
    for field in dataclasses.fields(TrainSettings):
        assert field.metadata["help"].endswith("."), field.name
        assert field.metadata["panel"] in ("Data", "Model", "Training", "Output"), field.name
    assert set(FIELD_TYPES) >= FREE_ON_RESUME


def test_defaults_are_not_shared():
    TrainSettings().data.append("mine")
    TrainSettings().peer["num_experts"] = 4
    assert TrainSettings().data == ["wikipedia-leads"]
    assert TrainSettings().peer == {}


def test_saved_settings_come_back(tmp_path):
    settings = TrainSettings(
        data=["a", "b"],
        peer={"num_experts": [64, 32], "init_std": 1e-5, "glu": True},
        mlp_layer_types=["dense", "peer"],
        num_hidden_layers=2,
        table_learning_rate=1e-3,
        output_dir="somewhere: else",
        prompt="ünï “quoted”",
    )
    settings.save(tmp_path / "new" / "settings.yaml")
    assert TrainSettings.load(tmp_path / "new" / "settings.yaml") == settings


def test_a_preset_may_be_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "steps: 7\nlearning_rate: 1e-3\nwarmup_steps: 5\npeer: {init_std: 2e-2}\n"
    )
    settings = load_preset("mine.yaml")
    assert (settings.steps, settings.learning_rate, settings.warmup_steps) == (7, 1e-3, 5.0)
    assert settings.peer == {"init_std": 0.02}
    assert settings.output_dir == "runs/mine"


def test_unknown_preset_names_those_there_are():
    with pytest.raises(
        ValueError, match=r"preset must be one of demo, .*paper-middle or a YAML file, got 'dem'"
    ):
        load_preset("dem")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", "unknown setting 'stepps'; did you mean 'steps'?"),
        ("xyzzy: 3", "unknown setting 'xyzzy'$"),
        ("3: 3", "unknown setting 3"),
        ("[steps, 3]", "must hold settings as name: value, got list"),
        ("", "must hold settings as name: value, got NoneType"),
        ("a: [", "is not a YAML file of settings"),
        ("steps: many", "steps must be int, got 'many'"),
    ],
)
def test_a_file_that_is_no_preset_is_named(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_preset(str(tmp_path / "bad.yaml"))
    assert "bad.yaml" in str(error.value) or "steps must" in str(error.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"steps: \xff\xfe")
    with pytest.raises(ValueError, match=r"bad.yaml is not a YAML file"):
        load_preset(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("name", sorted(FIELD_TYPES))
def test_every_field_refuses_another_type(name):
    value = object()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got <object"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", True, "steps must be int, got True"),
        ("steps", 2.5, "steps must be int, got 2.5"),
        ("learning_rate", "fast", "learning_rate must be float, got 'fast'"),
        ("document_mask", "yes", "document_mask must be bool, got 'yes'"),
        ("data", "text", "data must be list, got 'text'"),
        ("data", ["a", 3], "data must be list, got"),
        ("mlp_layer_types", 3, "mlp_layer_types must be str or list or none, got 3"),
        ("vocab_size", 0, "vocab_size must be at least 1, got 0"),
        ("context", 1, "context must be at least 2, got 1"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", -3, "batch_size must be at least 1, got -3"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps must be at least 1, got 0"),
        ("logging_steps", 0, "logging_steps must be at least 1, got 0"),
        ("eval_steps", 0, "eval_steps must be at least 1, got 0"),
        ("save_steps", 0, "save_steps must be at least 1, got 0"),
        ("save_total_limit", 0, "save_total_limit must be at least 1, got 0"),
        ("max_documents", 2, "max_documents must be at least 3, got 2"),
        ("weight_decay", -0.1, "weight_decay must be at least 0, got -0.1"),
        ("warmup_steps", -1, "warmup_steps must be at least 0, got -1"),
        ("warmup_steps", float("nan"), "warmup_steps must be at least 0, got nan"),
        ("learning_rate", 0, "learning_rate must be positive, got 0"),
        ("learning_rate", float("nan"), "learning_rate must be positive, got nan"),
        ("table_learning_rate", -1.0, "table_learning_rate must be positive, got -1.0"),
        ("retrieval_learning_rate", 0, "retrieval_learning_rate must be positive, got 0"),
        ("validation_share", 0.0, "validation_share must be between 0 and 1, got 0.0"),
        ("validation_share", 0.95, "validation_share and test_share must leave text .* got 0.95 and 0.05"),
        ("test_share", 1.5, "test_share must be between 0 and 1, got 1.5"),
        ("attention_dropout", 2, "attention_dropout must be at least 0 and below 1, got 2.0"),
        ("adam_beta1", 1.0, "adam_beta1 must be at least 0 and below 1, got 1.0"),
        ("adam_beta2", -0.1, "adam_beta2 must be at least 0 and below 1, got -0.1"),
        ("table_adam_beta1", 1.0, "table_adam_beta1 must be at least 0 and below 1, got 1.0"),
        ("table_second_moment", "col", "table_second_moment must be one of element, row, got 'col'"),
        ("precision", "float16", "precision must be one of auto, float32, bfloat16, got 'float16'"),
        ("lr_scheduler_type", "cosin", "lr_scheduler_type must be one of cosine, .*, got 'cosin'"),
    ],
)
def test_values_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2.5E+4", -2.5e4),
        (".5e1", 5.0),
        ("4", 4),
        ("true", True),
        ("[64, 32]", [64, 32]),
        ("e3", "e3"),
    ],
)
def test_yaml_reads_numbers_as_people_write_them(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


def test_the_reader_of_others_is_left_alone():
    assert yaml.safe_load("1e-3") == "1e-3"


def test_overrides_replace_fields_and_merge_arguments():
    settings = TrainSettings(peer={"num_experts": 64, "num_heads": 2})
    changed = settings.with_overrides({"steps": 5, "peer": {"num_heads": 4, "glu": True}})
    assert changed.steps == 5
    assert changed.peer == {"num_experts": 64, "num_heads": 4, "glu": True}
    assert settings.peer == {"num_experts": 64, "num_heads": 2}
    with pytest.raises(ValueError, match="steps must be at least 1"):
        settings.with_overrides({"steps": 0})


def test_only_what_is_learnt_counts_as_a_difference():
    settings = TrainSettings()
    free = {
        "output_dir": "x",
        "cache_dir": "x",
        "logging_steps": 99,
        "eval_steps": 99,
        "save_steps": 99,
        "save_total_limit": 99,
        "report_to": ["none"],
    }
    assert set(free) == FREE_ON_RESUME
    assert settings.differences(settings.with_overrides(free)) == []
    changed = settings.with_overrides({"steps": 3, "peer": {"glu": True}})
    assert changed.differences(settings) == ["peer: {'glu': True}, not {}", "steps: 3, not 1000"]


def test_second_moments_are_those_of_the_optimiser():
    assert SECOND_MOMENTS == rowwise_checks.SECOND_MOMENTS


def nested(line, depth):
    return "".join(line.format(this=f"a{i}", last=f"a{i - 1}") for i in range(1, depth))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a0: &a0 [x]\n" + nested("{this}: &{this} [*{last}, *{last}]\n", 60), "more than 10,000 values"),
        ("a0: &a0 {x: 1}\n" + nested("{this}: &{this} {{<<: [*{last}, *{last}]}}\n", 60), "10,000 values"),
        ("data: &a [*a]", "more than 10,000 values"),
        ("[" * 5000, "nested too deeply"),
        ("peer: " + "{a: " * 3000, "nested too deeply"),
        ("seed: 2001-13-45", "month must be in"),
        ("steps: " + "9" * 5000, "digits"),
        ("data: !!python/object/apply:os.system [ls]", "python/object/apply:os.system"),
        ("1: 2", "unknown setting 1"),
        ("data: [\x1b]", "special characters are not allowed"),
    ],
    ids=[
        "aliases",
        "merge keys",
        "of itself",
        "lists",
        "dicts",
        "date",
        "digits",
        "python",
        "name",
        "escape",
    ],
)
def test_hostile_settings_are_refused_at_once(tmp_path, text, reason):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        TrainSettings.load(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_settings_that_are_no_file_are_not_read(tmp_path, kind):
    path = tmp_path / "settings.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=r"settings\.yaml must be a YAML file"):
        TrainSettings.load(path)
