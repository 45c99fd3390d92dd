"""The command line as its users meet it: every option, every refusal, interruptions and kills."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pty
import random
import re
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import matplotlib.image
import pytest
import torch
import yaml
from transformers import LlamaConfig
from typer.testing import CliRunner

from million_experts import cli
from million_experts.layers import ExpertUsage
from million_experts.lm import report, training
from million_experts.lm.checkpoints import check_checkpoint, list_checkpoints
from million_experts.lm.corpora import load_corpora
from million_experts.lm.packing import tokenize_documents
from million_experts.lm.scoring import score_documents
from million_experts.lm.settings import FIELD_TYPES, TrainSettings, load_preset, preset_names
from million_experts.lm.trainer import LanguageModelTrainer
from million_experts.models import PeerConfig, PeerForCausalLM

WORDS = (
    "the a of in city river mountain king house small old new water light stone was has long great".split()
)
STEPS = 60
KILLED_STEPS = 1500
TINY = {
    "vocab_size": 300,
    "context": 32,
    "validation_share": 0.1,
    "test_share": 0.1,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "peer": {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8},
    "dense": {"width": 32},
    "precision": "float32",
    "steps": STEPS,
    "batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 30,
    "save_steps": 2,
    "report_to": ["none"],
}


def write_documents(path, count, seed=0):
    pick = random.Random(seed)
    texts = [" ".join(pick.choices(WORDS, k=pick.randint(10, 50))) + "." for _ in range(count)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")


@pytest.fixture(scope="module", autouse=True)
def _own_caches(tmp_path_factory):
    """For this process and for those it starts."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where resumed runs keep their tokens
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick():
    gc.collect()
    gc.freeze()  # the trainer collects garbage twice a run, and looks at all that was imported each time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**12)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_documents(folder / "text.jsonl", 200)
    write_documents(folder / "other.jsonl", 20, seed=1)
    tiny = {**TINY, "data": [str(folder / "text.jsonl")], "cache_dir": str(folder / "cache")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    return folder


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def train(folder, run, *arguments):
    return invoke("train", "--preset", folder / "tiny.yaml", "--output-dir", run, *arguments)


def message_of(result, code):
    """The one line on stderr; a usage error's box is joined to one."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code == 2:
        return " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def run(folder):
    """A finished run."""
    result = train(folder, folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def copy_of(run, tmp_path):
    """Copies the run, as it was before its end."""
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "results.json").unlink()
    return copy


@pytest.fixture
def trains(monkeypatch):
    """What `train` is called with, instead of calling it."""
    calls = []
    monkeypatch.setattr(training, "train", lambda settings, **kwargs: calls.append((settings, kwargs)))
    return calls


def losses(run, key="loss"):
    history = json.loads((run / "results.json").read_text())["history"]
    return {row["step"]: row[key] for row in history if key in row}


# Options.

OPTIONS = {
    "data": (["--data", "a.txt", "--data", "b.txt"], ["a.txt", "b.txt"]),
    "text_column": (["--text-column", "body"], "body"),
    "max_documents": (["--max-documents", "77"], 77),
    "validation_share": (["--validation-share", "0.2"], 0.2),
    "test_share": (["--test-share", "0.3"], 0.3),
    "vocab_size": (["--vocab-size", "999"], 999),
    "context": (["--context", "17"], 17),
    "document_mask": (["--no-document-mask"], False),
    "hidden_size": (["--hidden-size", "48"], 48),
    "num_hidden_layers": (["--num-hidden-layers", "5"], 5),
    "num_attention_heads": (["--num-attention-heads", "8"], 8),
    "num_key_value_heads": (["--num-key-value-heads", "1"], 1),
    "mlp_layer_types": (["--mlp-layer-types", "dense,peer,dense"], ["dense", "peer", "dense"]),
    "peer": (
        [
            "--peer",
            "num_experts=[16, 8]",
            "--peer",
            "init-std=1e-3",
            "--peer",
            "glu=true",
            "--peer",
            "score=relu",
        ],
        {**TINY["peer"], "num_experts": [16, 8], "init_std": 1e-3, "glu": True, "score": "relu"},
    ),
    "dense": (["--dense", "width=7"], {"width": 7}),
    "swiglu": (["--swiglu", "width=9"], {"width": 9}),
    "moe": (["--moe", "num_experts=4"], {"num_experts": 4}),
    "expert_choice": (["--expert-choice", "capacity_factor=1.5"], {"capacity_factor": 1.5}),
    "pkm": (["--pkm", "num_experts=64"], {"num_experts": 64}),
    "memory_plus": (["--memory-plus", "qk_norm=false"], {"qk_norm": False}),
    "tie_word_embeddings": (["--no-tie-word-embeddings"], False),
    "attention_dropout": (["--attention-dropout", "0.25"], 0.25),
    "steps": (["--steps", "7"], 7),
    "batch_size": (["--batch-size", "3"], 3),
    "gradient_accumulation_steps": (["--gradient-accumulation-steps", "6"], 6),
    "learning_rate": (["--learning-rate", "3e-4"], 3e-4),
    "table_learning_rate": (["--table-learning-rate", "1"], 1.0),
    "retrieval_learning_rate": (["--retrieval-learning-rate", "2e-4"], 2e-4),
    "weight_decay": (["--weight-decay", "0"], 0.0),
    "table_weight_decay": (["--table-weight-decay", "0.02"], 0.02),
    "adam_beta1": (["--adam-beta1", "0.8"], 0.8),
    "adam_beta2": (["--adam-beta2", "0.7"], 0.7),
    "table_adam_beta1": (["--table-adam-beta1", "0.3"], 0.3),
    "table_second_moment": (["--table-second-moment", "element"], "element"),
    "lr_scheduler_type": (["--lr-scheduler-type", "linear"], "linear"),
    "warmup_steps": (["--warmup-steps", "100"], 100.0),
    "max_grad_norm": (["--max-grad-norm", "0"], 0.0),
    "precision": (["--precision", "bfloat16"], "bfloat16"),
    "sync_query_norm": (["--no-sync-query-norm"], False),
    "gradient_checkpointing": (["--gradient-checkpointing"], True),
    "torch_compile": (["--torch-compile"], True),
    "seed": (["--seed", "5"], 5),
    "output_dir": (["--output-dir", "elsewhere"], "elsewhere"),
    "cache_dir": (["--cache-dir", "cache"], "cache"),
    "logging_steps": (["--logging-steps", "3"], 3),
    "eval_steps": (["--eval-steps", "4"], 4),
    "save_steps": (["--save-steps", "5"], 5),
    "save_total_limit": (["--save-total-limit", "9"], 9),
    "report_to": (["--report-to", "tensorboard", "--report-to", "mlflow"], ["tensorboard", "mlflow"]),
    "prompt": (["--prompt", "Once upon"], "Once upon"),
}


def test_every_setting_has_an_option_that_is_tested():
    assert list(OPTIONS) == list(FIELD_TYPES)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_setting_is_replaced_by_its_option_alone(folder, trains, name):
    arguments, value = OPTIONS[name]
    result = invoke("train", "--preset", folder / "tiny.yaml", *arguments)
    assert result.exit_code == 0, result.output
    ((settings, kwargs),) = trains
    preset = load_preset(str(folder / "tiny.yaml"))
    assert getattr(preset, name) != value, "a value that proves nothing"
    assert settings == preset.with_overrides({name: value})
    assert type(getattr(settings, name)) is type(value)
    assert kwargs["resume"] is False


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_presets_by_name(trains, preset):
    assert invoke("train", *([] if preset is None else ["--preset", preset])).exit_code == 0
    ((settings, _),) = trains
    assert settings == load_preset(preset or "demo")
    assert settings.output_dir == f"runs/{preset or 'demo'}"


def test_one_kind_of_feed_forward_stands_for_all(trains):
    invoke("train", "--mlp-layer-types", "dense")
    assert trains[0][0].mlp_layer_types == "dense"


def test_help_documents_every_option():
    result = CliRunner().invoke(cli.app, ["train", "-h"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in FIELD_TYPES:
        assert f"--{name.replace('_', '-')}" in result.output
    for name in preset_names():
        assert name in result.output
    for panel in ("Data", "Model", "Training", "Output"):
        assert f" {panel} " in result.output
    for command in ("train", "evaluate", "generate", "inspect", "info"):
        assert command in invoke("-h").output


def test_missing_packages_are_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(SystemExit, match=r'needs rich.table: pip install "million-experts\[train,data\]"'):
        runpy.run_path(cli.__file__)


# Refusals.

BAD_OPTIONS = [
    (["--preset", "dem"], 1, ["preset must be one of demo", "paper-middle", "'dem'"]),
    (["--steps", "many"], 2, ["--steps", "integer"]),
    (["--learning-rate", "fast"], 2, ["--learning-rate", "number"]),
    (["--stepps", "3"], 2, ["--stepps", "--steps"]),
    (["--steps", "0"], 1, ["steps must be at least 1, got 0"]),
    (["--precision", "float16"], 1, ["precision must be one of auto, float32, bfloat16, got 'float16'"]),
    (["--lr-scheduler-type", "cosin"], 1, ["lr_scheduler_type must be one of", "cosine", "'cosin'"]),
    (["--attention-dropout", "2"], 1, ["attention_dropout must be at least 0 and below 1, got 2.0"]),
    (["--adam-beta1", "1.5"], 1, ["adam_beta1 must be at least 0 and below 1, got 1.5"]),
    (["--report-to", "nothing-known"], 1, ["report_to", "nothing-known", "tensorboard"]),
    (["--report-to", "wandb"], 1, ["report_to=wandb", "pip install wandb"]),
    (["--hidden-size", "33"], 1, ["hidden_size (33) must be a multiple of num_attention_heads (2)"]),
    (["--num-key-value-heads", "3"], 1, ["num_attention_heads (2)", "num_key_value_heads (3)"]),
    (["--mlp-layer-types", "pear"], 1, ["no kind 'pear'", "'peer'", "dense, ", "moe, peer"]),
    (["--mlp-layer-types", "peer,dense"], 1, ["2 entries for num_hidden_layers=3"]),
    (["--peer", "num_expert=4"], 1, ["no argument 'num_expert'", "'num_experts'", "key_dim"]),
    (["--dense", "widht=4"], 1, ["no argument 'widht'", "'width'"]),
    (["--peer", "num_experts=17"], 1, ["num_experts=17", "16 or 18"]),
    (["--peer", "num_experts=many"], 1, ["num_experts must be an int or a pair", "'many'"]),
    (["--peer", "num_experts=[64"], 2, ["--peer", "'[64' is not a value of YAML"]),
    (["--peer", "num_experts"], 2, ["--peer", "must be name=value, got 'num_experts'"]),
    (["--dense", "=3"], 2, ["--dense", "must be name=value, got '=3'"]),
    (["--peer", "experts_per_head=99"], 1, ["experts_per_head must be at most 8", "got 99"]),
    (["--peer", "experts_per_head=0"], 1, ["experts_per_head must be", "got 0"]),
    (["--peer", "key_dim=7"], 1, ["key_dim", "must be even, got 7"]),
    (["--peer", "key_dim=big"], 1, ["key_dim must be", "'big'"]),
    (["--peer", "glu=maybe"], 1, ["glu must be true or false, got 'maybe'"]),
    (["--peer", "init_std=small"], 1, ["init_std must be a number, got 'small'"]),
    (["--peer", "init_std=0"], 1, ["init_std must be positive, got 0"]),
    (["--peer", "activation=tanh"], 1, ["activation must be one of 'gelu', 'relu', 'silu', got 'tanh'"]),
    (["--peer", "score=best"], 1, ["score must be one of 'softmax', 'sigmoid', 'relu', got 'best'"]),
    (["--peer", "query_norm=rms"], 1, ["query_norm must be one of 'batch', 'layer', 'none', got 'rms'"]),
    (["--peer", "backend=abacus"], 1, ["backend must be one of 'auto', 'reference'", "'abacus'"]),
    (["--peer", "backend=triton"], 1, ["backend 'triton' cannot run here"]),
    (["--data", "wikipedia-leeds"], 1, ["data='wikipedia-leeds'", "wikipedia-leads", ".jsonl"]),
    (["--data", "missing.txt"], 1, ["data='missing.txt' does not exist"]),
    (["--data", ""], 1, ["data must not be empty"]),
    (["--text-column", "body"], 1, ["text_column='body'", "its columns: text"]),
    (["--vocab-size", "100"], 1, ["vocab_size must be at least 257", "got 100"]),
    (["--context", "50000"], 1, ["context=50000", "train split", "smaller context"]),
    (["--context", "2000"], 1, ["context=2000", "validation split", "validation_share"]),
    (["--validation-share", "0.899"], 1, ["200 documents", "validation_share=0.899", "test_share=0.1"]),
]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    BAD_OPTIONS,
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_wrong_options_are_refused_by_name_and_leave_nothing(folder, tmp_path, arguments, code, words):
    if torch.cuda.is_available() and "backend=triton" in arguments:
        pytest.skip("it may run here")
    message = message_of(train(folder, tmp_path / "run", *arguments), code)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepps: 3", ["unknown setting 'stepps'; did you mean 'steps'?"]),
        ("steps: many", ["steps must be int, got 'many'"]),
        ("steps: [", ["is not a YAML file of settings"]),
        ("- steps", ["must hold settings as name: value, got list"]),
        ("peer: {num_expert: 4}", ["no argument 'num_expert'", "'num_experts'"]),
    ],
)
def test_wrong_presets_are_refused(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    result = invoke("train", "--preset", tmp_path / "bad.yaml", "--output-dir", tmp_path / "run")
    message = message_of(result, 1)
    for word in words:
        assert word in message


CORPORA = {
    "empty.txt": (b"", ["empty.txt", "no documents"]),
    "blank.txt": (b" \n\t ", ["blank.txt", "no documents"]),
    "latin.txt": ("caf\xe9".encode("latin-1"), ["latin.txt is not UTF-8: byte 0xe9 at offset 3"]),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', ["latin.jsonl", "0xe9"]),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', ["broken.jsonl", "cannot be read as json"]),
    "two.jsonl": (b'{"text": "one"}\n{"text": "two"}\n', ["2 documents", "too few"]),
    "short.jsonl": (b'{"text": "one"}\n{"text": "two"}\n{"text": "six"}\n', ["context=32", "in 1 documents"]),
    "picture.png": (b"\x89PNG", ["picture.png", "not of a kind that can be read", ".parquet"]),
}


@pytest.mark.parametrize("name", CORPORA)
def test_text_that_does_not_do_is_refused(folder, tmp_path, name):
    content, words = CORPORA[name]
    (tmp_path / name).write_bytes(content)
    result = train(folder, tmp_path / "run", "--data", tmp_path / name)
    assert result.exit_code == 1
    message = result.stderr.splitlines()[-1]  # a small corpus also draws a warning about its vocabulary
    assert message.startswith("Error ")
    for word in words:
        assert word in message
    assert (tmp_path / name).read_bytes() == content
    assert not list((tmp_path / "run").iterdir())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_a_run_is_not_written_over(folder, run):
    before = contents(run)
    message = message_of(train(folder, run), 1)
    assert f"output_dir {run} already holds a run" in message
    assert "--resume" in message
    assert "another --output-dir" in message
    assert contents(run) == before


def test_a_folder_with_other_files_is_not_touched(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for arguments in ([], ["--resume"]):
        message = message_of(train(folder, tmp_path, *arguments), 1)
        assert f"output_dir {tmp_path} holds files that are not a run's" in message
    assert contents(tmp_path) == {tmp_path / "thesis.txt": b"mine"}
    message = message_of(train(folder, tmp_path / "thesis.txt"), 1)
    assert "thesis.txt" in message


def test_what_cannot_fit_is_refused_after_the_plan(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 10**8)
    result = train(folder, tmp_path / "run")
    message = message_of(result, 1)
    for way_out in ("--peer num_experts=", "--batch-size", "--gradient-checkpointing"):
        assert way_out in message
    for part in ("parameters", "active for a token", "expected at the peak"):
        assert part in result.stdout
    assert not (tmp_path / "run").exists()


# Resuming.


def test_resuming_a_finished_run_needs_its_folder_alone(run):
    before = contents(run)
    result = invoke("train", "--output-dir", run, "--resume")
    assert result.exit_code == 0, result.output
    assert "is finished; its results:" in result.stdout
    assert "interpolated bigram" in result.stdout
    assert contents(run) == before


def test_resuming_goes_on_with_the_runs_own_settings(run, copy_of):
    shutil.rmtree(copy_of / f"checkpoint-{STEPS}")
    result = invoke("train", "--output-dir", copy_of, "--resume")
    assert result.exit_code == 0, result.output
    assert f"Going on from {copy_of / f'checkpoint-{STEPS - 2}'}" in result.stdout
    assert losses(copy_of) == losses(run)


def test_resuming_may_change_how_often_is_logged_evaluated_and_saved(run, copy_of):
    shutil.rmtree(copy_of / f"checkpoint-{STEPS}")
    cadences = ["--logging-steps", "4", "--eval-steps", STEPS - 1, "--save-steps", STEPS - 1]
    result = invoke("train", "--output-dir", copy_of, "--resume", *cadences, "--save-total-limit", "3")
    assert result.exit_code == 0, result.output
    assert list(losses(copy_of)) == [*range(1, STEPS - 1), STEPS]
    assert list(losses(copy_of, "eval_loss")) == [30, STEPS - 1, STEPS]
    assert [step for step, _ in list_checkpoints(copy_of)] == [STEPS - 2, STEPS - 1, STEPS]


def test_resuming_with_other_settings_lists_them(folder, copy_of):
    before = contents(copy_of)
    result = invoke("train", "--output-dir", copy_of, "--resume", "--steps", "99", "--peer", "glu=true")
    message = message_of(result, 1)
    assert f"steps: 99, not {STEPS}" in message
    assert "peer: {" in message
    assert "'glu': True" in message
    assert "another --output-dir" in message
    assert "seed" not in message
    assert contents(copy_of) == before
    assert "learning_rate" in message_of(train(folder, copy_of, "--resume", "--learning-rate", "1e-4"), 1)


def test_a_damaged_checkpoint_is_reported_and_kept(copy_of):
    weights = copy_of / f"checkpoint-{STEPS}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    before = contents(copy_of)
    message = message_of(invoke("train", "--output-dir", copy_of, "--resume"), 1)
    assert f"checkpoint-{STEPS} is damaged: model.safetensors cannot be read" in message
    assert message.endswith(f"remove it to go on from {copy_of / f'checkpoint-{STEPS - 2}'}")
    assert contents(copy_of) == before


def test_a_loss_that_is_not_finite_is_an_error_in_a_line(folder, tmp_path, monkeypatch):
    step = LanguageModelTrainer.training_step

    def poisoned(self, model, *arguments):
        if self.state.global_step == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)
        return step(self, model, *arguments)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", poisoned)
    message = message_of(train(folder, tmp_path / "run"), 1)
    assert "the loss became nan in step 4" in message
    assert "learning_rate" in message
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert invoke("generate", tmp_path / "run" / "checkpoint-2", "--max-new-tokens", 3).exit_code == 0


# Interruptions and kills.

SERVER = multiprocessing.get_context(
    "forkserver"
)  # one process imports everything; its children start at once


def _command(arguments, log, ignored):
    # Whoever runs these tests may have it ignored.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    import million_experts.layers.peer

    million_experts.layers.peer.INIT_PAIRS = 2**12
    cli.app(arguments)


def start(folder, run, log, *arguments, ignored=False):
    SERVER.set_forkserver_preload(["million_experts.lm.training", "million_experts.cli"])
    options = ["train", "--preset", folder / "tiny.yaml", "--output-dir", run, *arguments]
    process = SERVER.Process(target=_command, args=([str(option) for option in options], str(log), ignored))
    process.start()
    return process


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None, "it ended too early"
        assert time.monotonic() < end
        time.sleep(0.001)


def newest(run):
    return max((step for step, _ in list_checkpoints(run)), default=0)


def test_ctrl_c_saves_and_names_the_command_that_goes_on(folder, run, tmp_path):
    program = Path(sys.executable).with_name("million-experts")
    if not program.exists():
        pytest.skip("million-experts is not installed beside this python")
    own = tmp_path / "a run"
    command = [program, "train", "--preset", folder / "tiny.yaml", "--output-dir", own]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    stop = re.search(r"(?m)^Stopped after step (\d+) of (\d+); .* Go on with: (.*)", stderr)
    assert stop, stderr
    assert 3 <= int(stop[1]) < int(stop[2]) == STEPS
    assert newest(own) == int(stop[1])
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    going_on = subprocess.run(
        shlex.split(stop[3]), env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert going_on.returncode == 0, going_on.stderr
    assert f"Going on from {own / f'checkpoint-{stop[1]}'}" in going_on.stdout
    results = json.loads((own / "results.json").read_text())
    assert results["steps"] == STEPS
    assert list(losses(own)) == list(range(1, STEPS + 1))


def test_sigterm_saves_too(folder, tmp_path):
    own, log = tmp_path / "run", tmp_path / "log"
    process = start(folder, own, log)
    wait_for(lambda: newest(own) >= 2, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 130, log.read_text()
    stop = re.search(r"Stopped after step (\d+) of", log.read_text())
    assert stop
    assert newest(own) == int(stop[1])


def test_sighup_saves_too_unless_it_is_ignored(folder, tmp_path):
    own, log = tmp_path / "run", tmp_path / "log"
    process = start(folder, own, log)
    wait_for(lambda: newest(own) >= 2, process)
    os.kill(process.pid, signal.SIGHUP)
    process.join(60)
    assert process.exitcode == 130, log.read_text()
    stop = re.search(r"Stopped after step (\d+) of", log.read_text())
    assert stop
    assert newest(own) == int(stop[1]) < STEPS
    log = tmp_path / "second log"
    process = start(folder, own, log, "--resume", ignored=True)  # as under nohup
    wait_for(lambda: log.exists() and "step " in log.read_text(), process)
    os.kill(process.pid, signal.SIGHUP)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert (own / "results.json").exists()


@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_the_terminal_saves_too_unless_it_is_ignored(folder, tmp_path, ignored):
    own = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        options = ["train", "--preset", str(folder / "tiny.yaml"), "--output-dir", str(own)]
        os.execv(sys.executable, [sys.executable, "-m", "million_experts.cli", *options])
    end = time.monotonic() + 120
    while newest(own) < 2:
        assert time.monotonic() < end
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 65536)
    os.close(terminal)  # whoever watched is gone: the system sends SIGHUP, and writing there fails
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if ignored else 130)
    if ignored:
        assert (own / "results.json").exists()
        return
    assert 2 <= newest(own) < STEPS
    check_checkpoint(own / f"checkpoint-{newest(own)}", PeerForCausalLM.from_pretrained(own / "checkpoint-2"))
    result = invoke("train", "--output-dir", own, "--resume")
    assert result.exit_code == 0, result.output
    assert list(losses(own)) == list(range(1, STEPS + 1))


def test_a_second_process_is_refused_and_harms_nothing(folder, run, tmp_path):
    own, log = tmp_path / "run", tmp_path / "log"
    process = start(folder, own, log)
    wait_for((own / "settings.yaml").exists, process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for arguments in ([], ["--resume"]):
            message = message_of(train(folder, own, *arguments), 1)
            assert "already holds a run" in message if not arguments else f"{own} is in use" in message
        assert f"is in use: process {process.pid} on " in message
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert losses(own) == losses(run)
    assert not list(own.glob(".*"))


def test_of_processes_that_begin_together_one_trains(folder, run, tmp_path):
    own, logs = tmp_path / "run", [tmp_path / f"log{i}" for i in range(3)]
    processes = [start(folder, own, log, "--resume") for log in logs]
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for code, log in zip(codes, logs, strict=True):
        output = log.read_text()
        assert code == 0 or f"Error output_dir {own} is in use: " in output, output
        assert "Traceback" not in output
    assert 0 in codes
    assert losses(own) == losses(run), "no step was taken twice"
    assert not list(own.glob(".*"))


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced by another run"])
@pytest.mark.parametrize("when", ["before a checkpoint", "at the end"])
def test_a_folder_removed_while_it_is_trained_in_is_an_error(folder, run, tmp_path, monkeypatch, how, when):
    own, step, score = tmp_path / "run", LanguageModelTrainer.training_step, report.score_documents

    def remove():
        if how == "renamed":
            own.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(own)
        if how == "replaced by another run":
            shutil.copytree(run, own)

    def removing(self, *arguments):
        if self.state.global_step == 3 and when == "before a checkpoint":
            remove()
        return step(self, *arguments)

    def removing_at_the_end(*arguments, **options):
        remove()
        return score(*arguments, **options)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", removing)
    if when == "at the end":
        monkeypatch.setattr(report, "score_documents", removing_at_the_end)
    message = message_of(train(folder, own, "--report-to", "tensorboard", "--steps", "8"), 1)
    assert str(own) in message
    assert (
        "was removed, renamed or given to another run" in message or "is not there, or no longer" in message
    )
    if how == "replaced by another run":
        assert contents(own) == contents_of_copy(run, own)
    else:
        assert not own.exists()


def contents_of_copy(run, copy):
    return {copy / path.relative_to(run): content for path, content in contents(run).items()}


def test_a_link_in_a_strangers_run_moves_nothing(copy_of, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    (copy_of / ".partial").symlink_to(mine)
    before = contents(copy_of)
    message = message_of(invoke("train", "--output-dir", copy_of, "--resume"), 1)
    assert f"output_dir {copy_of} holds .partial, which is a link to {mine}" in message
    assert (mine / "thesis.txt").read_text() == "mine"
    assert contents(copy_of) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"test": 3}', b"[" * 10**5, b"\xff"])
@pytest.mark.parametrize("name", ["results.json", "splits.json"])
def test_damaged_files_of_a_run_are_named(run, tmp_path, name, content):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / name).write_bytes(content)
    if name == "splits.json":
        (copy / "results.json").unlink()
    message = message_of(invoke("train", "--output-dir", copy, "--resume"), 1)
    assert f"{copy / name} is damaged" in message


def test_a_strangers_text_does_not_steer_the_terminal(run, folder, tmp_path):
    evil = shutil.copytree(run, tmp_path / "ev\x1b[31mil")
    results = json.loads((evil / "results.json").read_text())
    results["sample"] = results["parameters"]["label"] = "\x1b]0;title\x07\x9b2J\u202e"
    results["figures"] = ["\x1b[2J"]
    (evil / "results.json").write_text(json.dumps(results))
    odd = tmp_path / "te\x1b[2Jxt.jsonl"
    odd.write_text((folder / "other.jsonl").read_text())
    for arguments in (
        ["train", "--output-dir", evil, "--resume"],
        ["evaluate", evil, "--data", odd],
        ["evaluate", evil, "--data", odd, "--json"],
        ["inspect", evil, "--data", odd],
        ["generate", evil, "--prompt", "\x1b[31m", "--max-new-tokens", 3],
        ["info", evil],
        ["info", tmp_path / "\x1b[31mnothing"],
    ):
        output = invoke(*arguments).output
        assert "Traceback" not in output
        assert not re.search("[\x1b\x07\x9b\u202e]", output), arguments
        assert "x1b" in output or "u001b" in output


def test_training_shows_on_a_terminal_that_is_not_utf8(folder, tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PYTHONIOENCODING="ascii", LANG="C", TERM="xterm")
        options = ["train", "--preset", str(folder / "tiny.yaml"), "--output-dir", str(tmp_path / "run")]
        os.execv(sys.executable, [sys.executable, "-m", "million_experts.cli", *options, "--steps", "4"])
    written = b""
    while True:
        try:
            written += os.read(terminal, 65536)
        except OSError:
            break
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, written
    assert b"Sample" in written


def test_ctrl_c_before_training_is_no_traceback(folder, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "prepare_data", interrupted)
    result = train(folder, tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted\n"
    monkeypatch.undo()
    assert train(folder, tmp_path / "run", "--steps", "2").exit_code == 0


def kill(folder, run, log, ready, delay=0.0):
    """Kills `train --resume` that long after `ready()`; whatever is left must be whole."""
    process = start(folder, run, log, "--resume")
    wait_for(ready, process)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    for step, checkpoint in list_checkpoints(run):
        model = PeerForCausalLM.from_pretrained(checkpoint)
        check_checkpoint(checkpoint, model)
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step


# Rows of a large table wait for steps that touch them; a checkpoint falls between their catching up.
SPARSE = {
    "peer": {**TINY["peer"], "num_experts": 4096, "sparse_grad": True},
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module", params=["dense", "sparse"])
def uninterrupted(request, folder, run):
    """The folder of a preset with dense or sparse gradients, and a finished run of it."""
    if request.param == "dense":
        return folder, run
    own = folder / "sparse"
    own.mkdir()
    write_preset(own, folder, **SPARSE)
    result = train(own, own / "run")
    assert result.exit_code == 0, result.output
    return own, own / "run"


def write_preset(own, folder, **changes):
    values = yaml.safe_load((folder / "tiny.yaml").read_text())
    (own / "tiny.yaml").write_text(yaml.safe_dump(values | changes))


def test_a_killed_run_goes_on_as_if_nothing_had_been(uninterrupted, tmp_path):
    folder, run = uninterrupted
    own, log = tmp_path / "run", tmp_path / "log"
    kill(folder, own, log, lambda: (own / "settings.yaml").exists())
    first = newest(own)
    kill(folder, own, log, lambda: newest(own) > first, delay=random.random() * 0.2)
    second = newest(own)
    assert second > first
    halves = ".partial-checkpoint-*/*/model.safetensors"
    kill(folder, own, log, lambda: newest(own) > second and list(own.glob(halves)))
    result = train(folder, own, "--resume")
    assert result.exit_code == 0, result.output
    assert f"Going on from {own / 'checkpoint-'}" in result.stdout
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert losses(own) == losses(run)
    assert not list(own.glob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three to four minutes alone; on a busy machine it was cut off at ten
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_run_killed_at_thirty_random_moments_goes_on(folder, tmp_path, kind):
    changes = {"steps": KILLED_STEPS, "save_steps": 1, "eval_steps": 50}
    write_preset(tmp_path, folder, **changes, **(SPARSE if kind == "sparse" else {}))
    own, log, reached = tmp_path / "run", tmp_path / "log", [0]
    for _ in range(30):
        kill(tmp_path, own, log, lambda: True, delay=random.random() * 2.5)
        reached.append(newest(own))
    assert reached == sorted(reached), "a step that was saved stays saved"
    assert 0 < reached[-1] < KILLED_STEPS
    assert len(set(reached)) > 5, f"most kills came before training began: {reached}"
    for name in ("run", "straight"):
        result = train(tmp_path, tmp_path / name, "--resume")
        assert result.exit_code == 0, result.output
    straight = losses(tmp_path / "straight")
    assert list(straight) == list(range(1, KILLED_STEPS + 1))
    assert losses(own) == straight
    assert losses(own, "eval_loss") == losses(tmp_path / "straight", "eval_loss")


# Using a run.


def test_evaluate_gives_the_figures_of_the_run(run):
    stored = json.loads((run / "results.json").read_text())["test"]
    result = invoke("evaluate", run, "--json")
    figures = json.loads(result.stdout)
    assert figures.pop("data") == "test split of the run"
    assert figures == pytest.approx(stored, rel=1e-5)
    table = invoke("evaluate", run).stdout
    for part in (
        f"{stored['tokens']:,} tokens",
        f"{stored['perplexity']:.2f}",
        f"{stored['bits_per_byte']:.4f}",
    ):
        assert part in table


def test_evaluate_measures_other_text(run, folder):
    other = folder / "other.jsonl"
    result = invoke("evaluate", run, "--data", other, "--json", "--context", "16", "--batch-tokens", "64")
    figures = json.loads(result.stdout)
    model, tokenizer = cli._load(str(run))
    stream = tokenize_documents(load_corpora([str(other)]), tokenizer, folder / "cache")
    score = score_documents(model, stream, context=16)
    assert figures["data"] == str(other)
    assert figures["loss"] == pytest.approx(score.loss, rel=1e-5)
    assert figures["bytes"] == sum(len(json.loads(line)["text"]) for line in other.read_text().splitlines())
    both = json.loads(invoke("evaluate", run, "--data", other, "--data", other, "--json").stdout)
    assert both["tokens"] == 2 * figures["tokens"]
    fewer = invoke("evaluate", run, "--data", other, "--json", "--max-documents", 1)
    assert 0 < json.loads(fewer.stdout)["tokens"] < figures["tokens"]
    assert f"Scoring {len(stream):,} tokens: {other}" in result.stderr


def kept(cache):
    return {path.name for path in cache.iterdir()} if cache.exists() else set()


@pytest.mark.parametrize("command", ["evaluate", "inspect", "train"])
def test_text_is_cached_where_the_user_says_and_not_where_settings_do(
    copy_of, folder, tmp_path, monkeypatch, command
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    default = tmp_path / "home" / ".cache" / "million-experts"
    settings = TrainSettings.load(copy_of / "settings.yaml")
    settings.cache_dir = str(tmp_path / "strangers")
    settings.save(copy_of / "settings.yaml")
    arguments = [command, copy_of] if command != "train" else [command, "--output-dir", copy_of, "--resume"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    streams = kept(default)
    assert len(streams) == (3 if command == "train" else 1)
    (copy_of / "results.json").unlink(missing_ok=True)
    result = invoke(*arguments, "--cache-dir", tmp_path / "mine")
    assert result.exit_code == 0, result.output
    assert kept(tmp_path / "mine") == streams
    if command == "train":
        (copy_of / "results.json").unlink()
    elif command == "evaluate":
        invoke(*arguments, "--data", folder / "other.jsonl", "--cache-dir", tmp_path / "mine")
        assert len(kept(tmp_path / "mine")) == 2
    assert not (tmp_path / "strangers").exists()


def test_generate_is_repeatable(run):
    def text(*arguments):
        result = invoke("generate", run, "--prompt", "the city", "--max-new-tokens", 20, *arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("the city")
        return result.stdout

    assert text("--temperature", 0) == text("--temperature", 0, "--seed", 5)
    model, tokenizer = cli._load(str(run))
    inputs = tokenizer("the city", return_tensors="pt")
    greedy = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert text("--temperature", 0) == tokenizer.decode(greedy[0], skip_special_tokens=True) + "\n"
    assert text("--seed", 1) == text("--seed", 1)
    assert len({text("--seed", seed, "--temperature", 2) for seed in range(4)}) > 1
    assert message_of(invoke("generate", run, "--top-p", "2"), 2)
    assert message_of(invoke("generate", run, "--max-new-tokens", "0"), 2)


def test_inspect_shows_layers_and_heads(run, folder, tmp_path):
    figure = tmp_path / "new" / "figure.png"
    result = invoke("inspect", run, "--data", folder / "other.jsonl", "--figure", figure)
    assert result.exit_code == 0, result.output
    model, tokenizer = cli._load(str(run))
    stream = tokenize_documents(load_corpora([str(folder / "other.jsonl")]), tokenizer, folder / "cache")
    layer = model.get_submodule("model.layers.1.mlp")
    with ExpertUsage(layer) as usage:
        score_documents(model, stream, context=32)
    assert "model.layers.1.mlp" in result.stdout
    for head in (None, 0, 1):
        of = usage.figures(head)
        name = "all" if head is None else head
        row = rf"{name} .*{of.usage:.2%}.*{of.unevenness:.3f}.*{of.top_share:.3%}"
        assert re.search(row, result.stdout), row
    assert matplotlib.image.imread(figure).shape[0] > 400
    before = (run / "expert_usage.png").stat().st_mtime_ns
    assert str(run / "expert_usage.png") in invoke("inspect", run).stdout
    assert (run / "expert_usage.png").stat().st_mtime_ns > before


def test_info_shows_versions_backends_and_sizes(run):
    output = invoke("info").stdout
    for part in ("million-experts", torch.__version__, "backend reference    runs", "backend triton"):
        assert part in output
    for name in preset_names():
        output = invoke("info", name).stdout
        assert f"{name}: " in output
    assert "AdamW state" in output
    assert "1,073,741,824" in output, "2 x 512 x 1024^2 numbers in the tables of paper-middle"
    results = json.loads((run / "results.json").read_text())["parameters"]
    output = invoke("info", run).stdout
    assert f"{results['total']:,}" in output
    assert f"{results['active']:,}" in output


@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect", "info"])
def test_a_folder_without_a_model_is_refused(tmp_path, command):
    message = message_of(invoke(command, tmp_path), 1)
    assert "model must be a folder with a config.json" in message
    assert str(tmp_path) in message


def test_broken_models_are_refused(run, tmp_path):
    cut = shutil.copytree(run, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:1000])
    assert f"{cut / 'model.safetensors'} is damaged" in message_of(invoke("generate", cut), 1)
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert f"model {bare} has no weights that can be used" in message_of(invoke("inspect", bare), 1)
    mute = shutil.copytree(run, tmp_path / "mute")
    for path in mute.glob("tokenizer*"):
        path.unlink()
    assert f"model {mute} has no tokenizer that can be used" in message_of(invoke("generate", mute), 1)
    checkpoint = run / f"checkpoint-{STEPS}"
    assert f"data must be given: {checkpoint} is no run" in message_of(invoke("evaluate", checkpoint), 1)
    alone = invoke("evaluate", run, "--max-documents", 3)
    assert "max_documents goes with data" in message_of(alone, 1)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert "must be a PEER model for its size, got 'llama'" in message_of(
        invoke("info", tmp_path / "llama"), 1
    )
    dense = shutil.copytree(run, tmp_path / "dense")
    config = PeerConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_layer_types="dense"
    )
    PeerForCausalLM(config).save_pretrained(dense)
    assert "has no PEER layer to inspect" in message_of(invoke("inspect", dense), 1)
    assert "context must be at least 1" in message_of(invoke("evaluate", run, "--context", "0"), 1)


def test_paths_may_look_like_markup(run, folder, tmp_path):
    odd = tmp_path / "[red]text[" / "x].jsonl"  # to rich, a tag that opens and another that closes
    odd.parent.mkdir()
    odd.write_text((folder / "other.jsonl").read_text())
    for command, *arguments in (["evaluate"], ["inspect", "--figure", tmp_path / "f.png"]):
        result = invoke(command, run, "--data", odd, *arguments)
        assert result.exit_code == 0, result.output
        assert str(odd) in re.sub(r"\s", "", result.stdout)
    result = train(
        folder, tmp_path / "[bold]run", "--data", folder / "text.jsonl", "--data", odd, "--steps", "2"
    )
    assert result.exit_code == 0, result.output
    assert str(odd) in result.stdout
    assert str(tmp_path / "[bold]run" / "loss.png") in result.stdout


def test_a_new_process_reads_the_run_and_writes_text(run, tmp_path, monkeypatch):
    """One that never imports this package."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    script = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(run)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(run)!r}, trust_remote_code=True)
tokens = model.generate(**tokenizer("the city", return_tensors="pt"), max_new_tokens=20, do_sample=False)
print(type(model).__name__, tokenizer.decode(tokens[0], skip_special_tokens=True))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = invoke("generate", run, "--prompt", "the city", "--max-new-tokens", 20, "--temperature", 0)
    assert done.stdout == "PeerForCausalLM " + expected.stdout


def test_settings_of_the_run_are_those_asked_for(run, folder):
    preset = load_preset(str(folder / "tiny.yaml"))
    assert TrainSettings.load(run / "settings.yaml") == preset.with_overrides({"output_dir": str(run)})
