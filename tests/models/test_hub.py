"""Saved folders carry what programs need that never import this package.

What matters is what a process has imported: most cases run in one of their own, which looks into a folder of
its own for the code that transformers copies.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import configuration_utils

from million_experts.models import PeerConfig, PeerForCausalLM, PeerModel
from million_experts.models.hub import AUTO_MAP, MODULE


@pytest.fixture
def run(tmp_path):
    """Runs a script in a fresh process; gives what it prints."""

    def run(script: str, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


@pytest.fixture
def saved(tiny_model, tmp_path):
    folder = tmp_path / "saved"
    tiny_model().save_pretrained(folder)
    return folder


def carries_ours(folder):
    stored = json.loads((folder / "config.json").read_text())
    assert stored["auto_map"] == AUTO_MAP
    source = (folder / f"{MODULE}.py").read_text()
    return len(source.splitlines()) < 20 and [path.name for path in folder.glob("*.py")] == [f"{MODULE}.py"]


def test_a_process_that_never_imports_the_package_loads_runs_and_saves_a_model(run, saved, tmp_path, tokens):
    torch.save(tokens, tmp_path / "tokens.pt")
    run(
        """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, tokens, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
classes = [type(config), type(model), type(base), type(model.config), type(model.model)]
names = ["PeerConfig", "PeerForCausalLM", "PeerModel", "PeerConfig", "PeerModel"]
for cls, name in zip(classes, names):
    assert cls.__name__ == name and cls.__module__.startswith("million_experts.models"), cls
ours = sys.modules["million_experts.models"]
assert classes[:3] == [ours.PeerConfig, ours.PeerForCausalLM, ours.PeerModel]
tokens = torch.load(tokens)
torch.save(model(tokens).logits.detach(), again + ".pt")
model.save_pretrained(again)
assert type(AutoModelForCausalLM.from_pretrained(again)) is ours.PeerForCausalLM  # ours is imported by now
""",
        str(saved),
        str(tmp_path / "tokens.pt"),
        str(tmp_path / "again"),
    )
    expected = PeerForCausalLM.from_pretrained(saved).eval()(tokens).logits
    assert torch.equal(torch.load(tmp_path / "again.pt"), expected)
    assert carries_ours(saved)
    assert carries_ours(tmp_path / "again")
    copied = {path.name for path in (tmp_path / "modules").rglob("*.py")}
    assert copied == {"__init__.py", f"{MODULE}.py"}


def test_without_the_package_the_folder_says_what_to_install(run, saved):
    script = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "million_experts":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    assert (
        'ImportError: this model needs the package million-experts: pip install "million-experts[train]"'
        in (run(script, str(saved), code=1))
    )


def test_what_keeps_an_installed_package_from_being_imported_is_not_called_missing(run, saved):
    script = """
import sys
sys.modules["million_experts.models.modeling"] = None
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    stderr = run(script, str(saved), code=1)
    assert "million_experts.models.modeling" in stderr
    assert "pip install" not in stderr


def test_whoever_has_imported_the_package_is_not_asked(run, saved):
    printed = run(
        """
import sys, million_experts.models
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
""",
        str(saved),
    )
    assert printed.split() == ["PeerConfig", "PeerModel", "PeerForCausalLM"]


def test_every_way_to_save_carries_it(tiny_config, tmp_path, monkeypatch):
    tiny_config().save_pretrained(tmp_path / "config")
    PeerModel(tiny_config()).save_pretrained(tmp_path / "base")
    assert carries_ours(tmp_path / "config")
    assert carries_ours(tmp_path / "base")
    # A configuration that is pushed sends what is new in its folder. A model's folder is new, and sent whole.
    pushed = {}
    hub = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    if hasattr(configuration_utils, "hf_api"):
        monkeypatch.setattr(configuration_utils, "hf_api", lambda: hub)
    else:  # older versions call the hub's function themselves
        monkeypatch.setattr(configuration_utils, "create_repo", hub.create_repo)
    monkeypatch.setattr(
        PeerConfig,
        "_upload_modified_files",
        lambda self, folder, repo_id, files_timestamps, **_: pushed.update(
            {repo_id: set(os.listdir(folder)) - set(files_timestamps)}
        ),
    )
    tiny_config().save_pretrained(str(tmp_path / "new"), push_to_hub=True, repo_id="somebody/config")
    assert pushed == {"somebody/config": {"config.json", f"{MODULE}.py"}}


def test_a_configuration_stays_the_same_with_and_without_it(tiny_config):
    """Runs go on from checkpoints that were written before folders carried it."""
    config = tiny_config()
    stored = config.to_dict()
    del stored["auto_map"], stored["transformers_version"]
    assert PeerConfig.from_dict(stored) == config
    assert PeerConfig.from_dict({**stored, "auto_map": {"AutoConfig": "evil.Config"}}) == config


def test_a_strangers_auto_map_is_neither_run_nor_passed_on(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(AUTO_MAP, "evil.Model")
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    PeerForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert carries_ours(tmp_path / "again")
    assert not (tmp_path / "ran").exists()


def test_a_class_derived_from_ours_brings_its_own_file(run, tiny_config, tmp_path):
    (tmp_path / "derived.py").write_text(
        "from million_experts.models import PeerForCausalLM\nclass Derived(PeerForCausalLM):\n    pass\n"
    )
    tiny_config().save_pretrained(tmp_path / "config")
    run(
        """
import sys
sys.path.insert(0, sys.argv[1])
from derived import Derived
from million_experts.models import PeerConfig
Derived.register_for_auto_class("AutoModelForCausalLM")
Derived(PeerConfig.from_pretrained(sys.argv[2])).save_pretrained(sys.argv[3])
""",
        str(tmp_path),
        str(tmp_path / "config"),
        str(tmp_path / "saved"),
    )
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert stored["auto_map"] == {**AUTO_MAP, "AutoModelForCausalLM": "derived.Derived"}
    assert (tmp_path / "saved" / "derived.py").exists()


def test_vllm_is_told_of_the_architecture(monkeypatch):
    registered = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    (point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="million-experts")
    for _ in range(2):  # vLLM calls it in each of its processes, and may call it again
        point.load()()
    assert registered == {
        "PeerForCausalLM": "vllm.model_executor.models.transformers:TransformersForCausalLM"
    }
