"""Which versions of transformers are allowed, and what others are told."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import million_experts.models
from million_experts.models.versions import SUPPORTED, UnsupportedTransformers

ROOT = Path(__file__).parents[2]


def pinned(end: str) -> str:
    """The version of transformers that `make test-versions` takes at an end of the range."""
    text = (ROOT / "tests" / "versions" / f"{end}.txt").read_text()
    return re.search(r"^transformers==(.+)$", text, re.MULTILINE)[1]


def test_these_tests_run_with_the_version_that_they_are_to_try():
    """`make test-versions` names it: the environment's own must not come first."""
    wanted = os.environ.get("TEST_TRANSFORMERS")
    assert transformers.__version__ == (pinned(wanted) if wanted else transformers.__version__)
    assert SpecifierSet(SUPPORTED).contains(transformers.__version__)


def test_the_range_allowed_is_the_range_tested():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"transformers{SUPPORTED}" in extras["train"]
    lowest, above = (Version(re.search(rf"{sign}([\d.]+)", SUPPORTED)[1]) for sign in (">=", "<"))
    oldest, newest = Version(pinned("oldest")), Version(pinned("newest"))
    assert oldest.release[:2] == lowest.release
    assert (newest.major, newest.minor + 1) == above.release


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0", "5.25.0.dev0", "5.25.0", "6.0.0"])
def test_a_version_outside_says_so_in_a_sentence(monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.delitem(vars(million_experts.models), "PeerForCausalLM", raising=False)
    with pytest.raises(UnsupportedTransformers) as caught:
        from million_experts.models import PeerForCausalLM  # noqa: F401
    message = str(caught.value)
    assert f"needs transformers {SUPPORTED}, and this is transformers {version}: pip install" in message
    assert "\n" not in message


@pytest.mark.parametrize("version", ["5.4.0", "5.9.0", "5.24.7"])
def test_a_version_inside_is_taken(monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    million_experts.models.versions.check_transformers()


@pytest.mark.parametrize("first", ["million_experts", "transformers.models.auto.configuration_auto"])
def test_the_loader_says_the_same_and_everything_else_works(tiny_model, tmp_path, first):
    """transformers would say that it is too old, and would be upgraded out of the range."""
    tiny_model().save_pretrained(tmp_path)
    script = f"""
import transformers
transformers.__version__ = "5.25.1"
import {first}
import million_experts
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
    try:
        load({str(tmp_path)!r})
    except ImportError as error:
        assert "and this is transformers 5.25.1" in str(error), error
    else:
        raise AssertionError("loaded")
try:
    AutoConfig.for_model("peer")
except ImportError as error:
    assert "and this is transformers 5.25.1" in str(error), error
else:
    raise AssertionError("made")
assert AutoConfig.for_model("llama").model_type == "llama"
million_experts.PEER(8, num_experts=16, num_heads=1, experts_per_head=2, key_dim=4)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:million_experts", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
