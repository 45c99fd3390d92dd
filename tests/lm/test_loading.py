"""Folders that anybody may have written: what cannot be right is a sentence, and no code of theirs is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from million_experts import cli
from million_experts.lm.loading import load_config, load_model, load_tokenizer
from million_experts.lm.tokenizer import train_tokenizer
from million_experts.models import PeerConfig, PeerForCausalLM, PeerModel

WEIGHTS = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts"
COMMANDS = ("generate", "evaluate", "inspect", "info")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = train_tokenizer(["the city of light, a river and a mountain"] * 20, 280)
    config = PeerConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        mlp_layer_types=["dense", "peer"],
        peer={"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8},
        dense={"width": 32},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**12)
        PeerForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.jsonl").write_text('{"text": "the city of light"}\n')
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def change(path, **settings):
    content = json.loads(path.read_text())
    content.update(settings)
    path.write_text(json.dumps(content))


def change_weights(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder, **index):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / "part.safetensors", metadata={"format": "pt"})
    whole = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({**whole, **index}))


def run(command, folder):
    """The one line on stderr of a command that fails."""
    arguments = {
        "generate": ["--prompt", "the city", "--max-new-tokens", "2"],
        "evaluate": ["--data", str(folder / "text.jsonl")],
        "inspect": ["--data", str(folder / "text.jsonl"), "--figure", str(folder / "figure.png")],
        "info": [],
    }
    result = CliRunner().invoke(cli.app, [command, str(folder), *arguments[command]])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert "y/N" not in result.stdout
    (line,) = result.stderr.splitlines()
    return line


def set_to(value):
    return lambda folder: change_weights(folder, lambda tensors: tensors[EXPERTS].view(-1)[3:4].fill_(value))


WRONG_WEIGHTS = {
    "missing": (lambda f: change_weights(f, lambda t: t.pop(EXPERTS)), f"lacks {EXPERTS}"),
    "all missing": (lambda f: change_weights(f, dict.clear), "lacks lm_head.weight.* and 21 more"),
    "NaN": (set_to(float("nan")), f"NaN or infinity in {EXPERTS}"),
    "infinity": (set_to(-float("inf")), f"NaN or infinity in {EXPERTS}"),
    "statistics": (
        lambda f: change_weights(f, lambda t: t[f"{EXPERTS[:-7]}query_norm.running_var"].fill_(float("nan"))),
        "NaN or infinity in model.layers.1.mlp.query_norm.running_var",
    ),
    "unexpected": (
        lambda f: change_weights(f, lambda t: t.update(extra=torch.zeros(3))),
        "holds extra, which config.json leaves no place for",
    ),
    "shape": (
        lambda f: change_weights(f, lambda t: t.update({EXPERTS: torch.zeros(16, 2, 16)})),
        rf"other shapes .*{EXPERTS} \[16, 2, 16\] instead of \[64, 2, 16\]",
    ),
    "integers": (
        lambda f: change_weights(f, lambda t: t.update({EXPERTS: t[EXPERTS].long()})),
        f"another kind .*{EXPERTS} torch.int64",
    ),
    "fewer layers": (
        lambda f: change(f / "config.json", num_hidden_layers=1, mlp_layer_types=["dense"]),
        "holds model.layers.1",
    ),
    "more layers": (
        lambda f: change(f / "config.json", num_hidden_layers=3, mlp_layer_types=["dense", "peer", "peer"]),
        "lacks model.layers.2",
    ),
    "untied": (lambda f: change(f / "config.json", tie_word_embeddings=False), "lacks lm_head.weight"),
    "cut": (lambda f: os.truncate(f / WEIGHTS, 9000), f"{WEIGHTS} is damaged"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is damaged"),
    "long header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8), f"{WEIGHTS} is damaged"),
    "absent": (lambda f: (f / WEIGHTS).unlink(), "no model.safetensors and no pytorch_model.bin"),
    "index no JSON": (lambda f: [shard(f), os.truncate(f / f"{WEIGHTS}.index.json", 9)], "index.json is not"),
    "index without map": (lambda f: shard(f, weight_map=[1]), "index.json must map each tensor"),
    "index of numbers": (lambda f: shard(f, weight_map={EXPERTS: 5}), "index.json must map each tensor"),
    "index without metadata": (lambda f: shard(f, metadata=None), "object named metadata"),
    "index of elsewhere": (
        lambda f: shard(f, weight_map={EXPERTS: "../other.safetensors"}),
        "files of its own folder",
    ),
    "index of nothing": (lambda f: shard(f, weight_map={EXPERTS: "no.safetensors"}), "lacks no.safetensors"),
    "dtype": (lambda f: change(f / "config.json", dtype="int32"), "int32"),
    "generation": (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json must"),
    "quantised": (
        lambda f: change(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "optimum|gptq",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_cannot_be_right_are_named(folder, case):
    damage, words = WRONG_WEIGHTS[case]
    damage(folder)
    with pytest.raises(ValueError, match=f"model {folder} has no weights that can be used: .*({words})"):
        load_model(str(folder))


@pytest.mark.parametrize("case", ["cut", "shape", "index no JSON", "index of numbers", "index of nothing"])
def test_the_library_names_the_file_too(folder, case):
    damage, words = WRONG_WEIGHTS[case]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        PeerForCausalLM.from_pretrained(folder)


def test_a_table_that_the_file_lacks_is_not_made_first(folder):
    change_weights(folder, lambda tensors: tensors.pop(EXPERTS))
    peer = {"num_experts": 2**36, "num_heads": 2, "experts_per_head": 4, "key_dim": 8}  # 8.8 TB
    change(folder / "config.json", peer=peer)
    with pytest.raises(ValueError, match=f"lacks {EXPERTS}"):
        load_model(str(folder))


def test_what_is_right_loads(folder, whole):
    expected = PeerForCausalLM.from_pretrained(whole).state_dict()
    shard(folder)
    for name, tensor in load_model(str(folder)).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_pickles_are_read_for_their_tensors_alone(folder, tmp_path):
    expected = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    loaded = load_model(str(folder)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged"):
        load_model(str(folder))
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_model_without_its_output_layer_and_other_models_load(folder, whole, tmp_path):
    base = PeerModel.from_pretrained(whole)
    base.save_pretrained(folder)
    assert torch.equal(load_model(str(folder)).model.embed_tokens.weight, base.embed_tokens.weight)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    other.save_pretrained(tmp_path / "gpt2")
    loaded = load_model(str(tmp_path / "gpt2"))
    assert torch.equal(loaded.lm_head.weight, other.lm_head.weight)
    change_weights(tmp_path / "gpt2", lambda tensors: tensors.pop("transformer.ln_f.weight"))
    with pytest.raises(ValueError, match=r"they lack transformer.ln_f.weight"):
        load_model(str(tmp_path / "gpt2"))


P = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8}
WRONG_CONFIGS = {
    "not JSON": (b"{", "config.json is not valid JSON"),
    "empty": (b"", "config.json is not valid JSON"),
    "no UTF-8": (b'{"model_type": "p\xe9er"}', "config.json is not valid JSON"),
    "nested": (b"[" * 100_000, "config.json is not valid JSON"),
    "a list": (b"[]", "must hold a JSON object, got list"),
    "a number": (b"5", "must hold a JSON object, got int"),
    "null": (b"null", "must hold a JSON object, got NoneType"),
    "text": (b'"peer"', "must hold a JSON object, got str"),
    "no type": (b"{}", "no model_type None"),
    "unknown type": ({"model_type": "gizmo"}, "no model_type 'gizmo'.* code .*auto_map. is not run"),
    "type of another kind": ({"model_type": ["peer"]}, "no model_type"),
    "unknown kind": ({"mlp_layer_types": ["dense", "pear"]}, "no kind 'pear'; did you mean 'peer'"),
    "kind of another kind": ({"mlp_layer_types": [["dense"], "peer"]}, "mlp_layer_types"),
    "kinds of another kind": ({"mlp_layer_types": 5}, "mlp_layer_types"),
    "width as text": ({"hidden_size": "16"}, "hidden_size.* expected int, got str"),
    "no width": ({"hidden_size": None}, "hidden_size.* expected int, got NoneType"),
    "broken width": ({"hidden_size": 16.5}, "hidden_size.* expected int, got float"),
    "width beyond memory": ({"hidden_size": 2 * 10**30}, "hidden_size must be at most"),
    "layers beyond memory": (
        {"num_hidden_layers": 10**9, "mlp_layer_types": "peer"},
        "num_hidden_layers must",
    ),
    "labels beyond memory": ({"num_labels": 10**9}, "num_labels must be at most"),
    "vocabulary beyond memory": ({"vocab_size": 10**18}, "vocab_size must be at most"),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
    "no width of a head": ({"head_dim": 0}, r"head_dim .0. must be even"),
    "no heads of keys": ({"num_key_value_heads": 0}, r"must be a multiple of num_key_value_heads .0."),
    "switch as text": ({"use_cache": "yes"}, "use_cache.* expected bool, got str"),
    "rope": ({"rope_parameters": {"rope_type": "gizmo"}}, "rope_type must be one of .* got 'gizmo'"),
    "rope base": ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a positive number, got 'x'"),
    "rope of another kind": ({"rope_parameters": 5}, "rope_parameters"),
    "rope half": ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "dtype": ({"dtype": "gizmo"}, "gizmo"),
    "dtype of another kind": ({"dtype": 5}, "dtype must be text, got 5"),
    "labels of another kind": ({"id2label": 5}, "cannot be read"),
    "arguments of another kind": ({"peer": [1]}, "peer"),
    "argument that is none": ({"peer": {**P, "expert": 5}}, "PEER has no argument 'expert'"),
    "experts as text": ({"peer": {**P, "num_experts": "64"}}, "num_experts must be an int or a pair"),
    "prime": ({"peer": {**P, "num_experts": 10**18 + 9}}, "num_experts must be at most"),
    "pair": ({"peer": {**P, "num_experts": [10**30, 10**30]}}, "num_experts must be at most"),
    "keys beyond memory": ({"peer": {**P, "key_dim": 10**18}}, "peer: no such layer can be built"),
    "gate as text": ({"peer": {**P, "glu": "no"}}, "peer: glu must be true or false, got 'no'"),
    "size as text": ({"peer": {**P, "init_std": "x"}}, "peer: init_std must be a number, got 'x'"),
    "activation": ({"peer": {**P, "activation": []}}, "activation must be one of"),
    "another layer's argument": ({"num_experts": 5}, r"give peer=dict\(num_experts"),
    "auto_map of another kind": ({"auto_map": 5}, "not iterable"),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_by_its_name(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    if name == "config.json":
        with pytest.raises(ValueError, match=rf"{name} cannot be read: Is a directory"):
            load_model(str(folder))
    else:
        load_model(str(folder))


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_configurations_that_cannot_be_right_are_refused_at_once(folder, case):
    content, words = WRONG_CONFIGS[case]
    if isinstance(content, bytes):
        (folder / "config.json").write_bytes(content)
    else:
        change(folder / "config.json", **content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"model {folder} has no configuration that can be used: .*{words}"):
        load_config(str(folder))
    if not case.startswith(("unknown type", "no type", "type of", "auto_map")):
        with pytest.raises(ValueError, match=words):
            PeerConfig.from_pretrained(folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff"])
def test_damaged_tokenizers_are_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"model {folder} has no tokenizer that can be used: .*{name}"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("kind", ["peer", "gizmo"])
def test_a_folders_code_is_never_run_and_nobody_is_asked(folder, tmp_path, kind):
    """By any command, whether the architecture is known here or not, by way of any file."""
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom million_experts.models import *\nT = PeerConfig\n"
    )
    classes = {"AutoConfig": "evil.PeerConfig", "AutoModelForCausalLM": "evil.PeerForCausalLM"}
    change(folder / "config.json", model_type=kind, auto_map=classes)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
    if kind == "peer":
        auto_map = {"AutoTokenizer": [None, "evil.T"]}
        change(folder / "tokenizer_config.json", tokenizer_class="T", auto_map=auto_map)
    for command in COMMANDS if kind == "gizmo" else COMMANDS[:-1]:
        assert re.search(r"code .*\(auto_map\).* is not run here", run(command, folder))
    assert not (tmp_path / "ran").exists()


def test_tokens_beyond_the_vocabulary_are_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["city"])
    tokenizer.save_pretrained(folder)
    for command in COMMANDS[:-1]:
        assert f"the tokenizer gives token {len(tokenizer) - 1}, the model knows" in run(command, folder)
    assert CliRunner().invoke(cli.app, ["generate", str(folder), "--prompt", "the"]).exit_code == 0


def test_scores_that_are_not_finite_are_not_sampled_from(folder):
    change(folder / "config.json", rms_norm_eps=-100.0)
    assert "scores are NaN after 4 tokens" in run("generate", folder)


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_a_command_says_it_in_a_line(folder, command):
    WRONG_WEIGHTS["missing"][0](folder)
    assert run(command, folder) == (
        f"Error model {folder} has no weights that can be used: "
        f"{folder} lacks {EXPERTS}, which config.json asks for"
    )


@pytest.mark.parametrize(
    "content", ['{"num_beams": "x"}', '{"repetition_penalty": "x"}', '{"num_beams": -3}']
)
def test_generation_settings_that_cannot_be_used_are_a_line(folder, content):
    (folder / "generation_config.json").write_text(content)
    assert f"model {folder} has something that text cannot be written with" in run("generate", folder)


def test_names_and_text_of_strangers_are_printed_not_obeyed(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "\x1b[31mred")
    written = CliRunner().invoke(cli.app, ["generate", str(folder), "--prompt", "the \x1b]0;mine\x07"])
    assert written.exit_code == 0
    assert written.stdout.startswith(r"the \x1b]0;mine\x07")
    change_weights(folder, lambda tensors: tensors.update({"\x1b[2Jextra": torch.zeros(3)}))
    for command in COMMANDS[:-1]:
        line = run(command, folder)
        assert "\x1b" not in line
        assert r"\x1b[31mred" in line
        assert r"holds \x1b[2Jextra" in line
