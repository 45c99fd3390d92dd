"""transformers' Auto classes know our models after `import million_experts`, in either order of imports.

Each case runs in a process of its own, since what has been imported is the point.
"""

import os
import subprocess
import sys

import pytest

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r})
assert type(model).__name__ == "PeerForCausalLM", type(model)
"""


def run(script: str) -> str:
    """What the script prints. Warnings are errors, transformers' own deprecations apart."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:million_experts", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def saved(tiny_model, tmp_path) -> str:
    tiny_model().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers; import million_experts",  # transformers is lazy: no Auto class is there yet
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM; import million_experts",
        "import million_experts; from transformers import Trainer",  # reaches the Auto classes by detours
    ],
)
def test_importing_the_package_is_enough_to_load_a_model(saved, imports):
    run(f"{imports}\n{LOAD.format(path=saved)}")


def test_the_package_imports_without_loading_transformers():
    run("""
import sys
import million_experts
loaded = [name for name in sys.modules if name.partition(".")[0] in ("transformers", "huggingface_hub")]
assert not loaded, loaded
import million_experts.models
assert "PeerForCausalLM" in dir(million_experts.models)
assert "transformers" not in sys.modules
""")


def test_without_transformers_the_package_works_and_says_what_the_models_need():
    run("""
import sys
sys.modules["transformers"] = None
from million_experts import PEER
try:
    from million_experts.models import PeerConfig
except ImportError as error:
    assert "million-experts[train]" in str(error), error
else:
    raise AssertionError("imported")
""")


def test_a_failing_registration_leaves_transformers_working():
    printed = run("""
import sys, warnings
import million_experts
sys.modules["million_experts.models.configuration"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoConfig
print([str(w.message) for w in caught if "million_experts could not register" in str(w.message)])
assert AutoConfig.for_model("llama").model_type == "llama"
""")
    assert printed.count("could not register") == 1


def test_the_hook_is_installed_once_and_leaves_when_it_has_done_its_work():
    run("""
import sys
from million_experts.models.registration import _AfterImport, register_when_transformers_is_imported
register_when_transformers_is_imported()
register_when_transformers_is_imported()
count = lambda: sum(isinstance(finder, _AfterImport) for finder in sys.meta_path)
assert count() == 1
from transformers import AutoConfig
assert count() == 0
assert "million_experts.models.modeling" not in sys.modules  # modelling waits for a configuration
register_when_transformers_is_imported()
assert count() == 0
assert type(AutoConfig.for_model("peer")).__name__ == "PeerConfig"
""")


def test_a_pickled_configuration_is_enough_to_make_a_model(tiny_config, tmp_path):
    """As a spawned worker receives it: its class is imported, its constructor never called."""
    import pickle

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(tiny_config()))
    run(f"""
import pickle
config = pickle.loads(open({str(tmp_path / "config.pickle")!r}, "rb").read())
from transformers import AutoModel
assert type(AutoModel.from_config(config)).__name__ == "PeerModel"
""")
