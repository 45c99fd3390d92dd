"""A full disk, a read-only folder: a line says what to do, the last checkpoint is whole, and on it goes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from typer.testing import CliRunner

from million_experts import cli
from million_experts.lm import report
from million_experts.lm.checkpoints import check_checkpoint, list_checkpoints
from million_experts.lm.files import WriteError, explained
from million_experts.lm.trainer import LanguageModelTrainer
from million_experts.models import PeerConfig, PeerForCausalLM

STEPS = 8
# Sparse gradients of a table that is most of every checkpoint; rows wait, in two micro-batches a step.
TINY = {
    "vocab_size": 300,
    "context": 32,
    "validation_share": 0.1,
    "test_share": 0.1,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "peer": {"num_experts": 4096, "num_heads": 2, "experts_per_head": 4, "key_dim": 8, "sparse_grad": True},
    "dense": {"width": 32},
    "table_adam_beta1": 0.9,  # with both moments of every element the optimiser is larger than the model
    "table_second_moment": "element",
    "precision": "float32",
    "steps": STEPS,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "eval_steps": STEPS,
    "save_steps": 2,
    "save_total_limit": 10,
    "report_to": ["none"],
}


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    gc.collect()
    gc.freeze()  # the trainer collects garbage twice a run, and looks at all that was imported each time
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _own_caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where resumed runs keep their tokens
        yield


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    for name in ("loss_figure", "usage_figure"):
        monkeypatch.setattr(report, name, lambda *arguments: None)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A finished run; what others must come to."""
    folder = tmp_path_factory.mktemp("writes")
    pick = random.Random(0)
    words = "the a of in city river mountain king house small old new water light stone was has great".split()
    texts = [" ".join(pick.choices(words, k=pick.randint(10, 50))) + "." for _ in range(100)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tiny = {**TINY, "data": [str(folder / "text.jsonl")], "cache_dir": str(folder / "cache")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss_figure", "usage_figure"):
            patch.setattr(report, name, lambda *arguments: None)
        result = start(folder, folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def run(straight, tmp_path):
    """The run as it was after its checkpoint of step 2."""
    return at_step_two(straight, tmp_path / "run")


def at_step_two(straight, run):
    shutil.copytree(straight, run)
    for step, checkpoint in list_checkpoints(run):
        if step > 2:
            shutil.rmtree(checkpoint)
    for name in ("results.json", "model.safetensors", "config.json"):
        (run / name).unlink()
    return run


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def start(folder, run, *arguments):
    return invoke("train", "--preset", folder / "tiny.yaml", "--output-dir", run, *arguments)


def resume(run, *arguments):
    return invoke("train", "--output-dir", run, "--resume", *arguments)


def message_of(result):
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error ")
    return line


def losses(run):
    history = json.loads((run / "results.json").read_text())["history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def check_left(run, step):
    """The newest checkpoint is that of `step`, all are whole, and nothing half-written takes room."""
    checkpoints = list_checkpoints(run)
    assert max((number for number, _ in checkpoints), default=0) == step
    for _, checkpoint in checkpoints:
        check_checkpoint(checkpoint, PeerForCausalLM.from_pretrained(checkpoint))
    assert not list(run.glob(".partial*"))
    assert not (run / "results.json").exists()


def check_goes_on(run, step, straight):
    """Resuming from what is left ends in the losses of the run that nothing happened to, to the bit."""
    result = resume(run)
    assert result.exit_code == 0, result.output
    assert f"Going on from {run / f'checkpoint-{step}'}" in result.stdout
    assert list(losses(straight)) == list(range(1, STEPS + 1))
    assert losses(run) == losses(straight)


@contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: every writer fails as on a full disk, with another reason."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, before[1])
    )  # Python ignores the signal that goes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("model.safetensors", "File too large"),
        ("optimizer.pt", "not all of it was taken"),
        ("trainer_state.json", "File too large"),
    ],
)
def test_a_checkpoint_that_finds_no_room(run, straight, monkeypatch, failing, reason):
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoint-2").iterdir()}
    save = LanguageModelTrainer._write_checkpoint
    save_state = LanguageModelTrainer._save_rng_state

    def limited(self, model, trial, folder, scratch):
        size = {"model.safetensors": sizes["scheduler.pt"], "optimizer.pt": sizes["model.safetensors"] + 100}
        with largest_file(size.get(failing, resource.RLIM_INFINITY)):
            save(self, model, trial, folder, scratch)

    def save_state_then_limit(self, output_dir):
        save_state(self, output_dir)
        if failing == "trainer_state.json":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    monkeypatch.setattr(LanguageModelTrainer, "_write_checkpoint", limited)
    monkeypatch.setattr(LanguageModelTrainer, "_save_rng_state", save_state_then_limit)
    message = message_of(resume(run))
    assert f"checkpoint-4 could not be written to {run}: {reason}; " in message
    assert re.search(r"; [\d,.]+ MB are free there\. Make room there, or let it be written to, then", message)
    assert message.endswith(f"go on from {run / 'checkpoint-2'} by --resume")
    check_left(run, 2)
    monkeypatch.undo()
    check_goes_on(run, 2, straight)


def test_a_first_checkpoint_that_finds_no_room(straight, tmp_path, monkeypatch):
    save, run = LanguageModelTrainer._write_checkpoint, tmp_path / "run"

    def limited(*arguments):
        with largest_file(1000):
            save(*arguments)

    monkeypatch.setattr(LanguageModelTrainer, "_write_checkpoint", limited)
    message = message_of(start(straight.parent, run))
    assert f"checkpoint-2 could not be written to {run}: File too large; " in message
    assert message.endswith("then start again by --resume")
    check_left(run, 0)
    monkeypatch.undo()
    assert resume(run).exit_code == 0
    assert losses(run) == losses(straight)


def test_a_final_model_that_finds_no_room(run, straight, monkeypatch):
    save = PeerForCausalLM.save_pretrained

    def limited(self, folder, **options):
        with largest_file(1000 if Path(folder).parent == run else resource.RLIM_INFINITY):
            save(self, folder, **options)

    monkeypatch.setattr(PeerForCausalLM, "save_pretrained", limited)
    message = message_of(resume(run))
    assert f"the model could not be written to {run}: File too large; " in message
    check_left(run, STEPS)
    monkeypatch.undo()
    check_goes_on(run, STEPS, straight)


def test_a_checkpoint_of_another_configuration(run, straight):
    foreign = run / "checkpoint-4"
    shutil.copytree(straight / "checkpoint-4", foreign)
    config = PeerConfig.from_pretrained(foreign)
    config.peer |= {"num_experts": 1024}
    PeerForCausalLM(config).save_pretrained(foreign)
    message = message_of(resume(run))
    assert f"checkpoint {foreign} belongs to another configuration: peer.num_experts is 1024" in message
    assert message.endswith(f"the model has 4096; remove it to go on from {run / 'checkpoint-2'}")
    shutil.rmtree(foreign)
    check_left(run, 2)
    check_goes_on(run, 2, straight)


# The mode of a folder means nothing to root. Capabilities are a thread's own, and those in effect come back.
CAPABILITIES = 0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER


@contextmanager
def without_privileges(for_good=False):
    """In this thread the mode of a folder holds for root too."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may write everywhere, and only Linux lets it do without")
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the third version; this thread
    before, fewer = (
        (ctypes.c_uint32 * 6)(),
        (ctypes.c_uint32 * 6)(),
    )  # effective, permitted, inheritable; twice
    assert library.capget(header, before) == 0
    fewer[:] = before[:]
    fewer[0] &= ~CAPABILITIES
    if for_good:
        fewer[1] &= ~CAPABILITIES
    assert library.capset(header, fewer) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert for_good or library.capset(header, before) == 0


@pytest.fixture
def read_only():
    """Makes a folder read-only until the test is over."""
    folders = []

    def make(folder):
        folders.append(folder)
        folder.chmod(0o555)

    yield make
    for folder in folders:
        folder.chmod(0o755)


def test_a_folder_that_becomes_read_only(run, straight, monkeypatch, read_only):
    step = LanguageModelTrainer.training_step

    def closing(self, *arguments):
        if self.state.global_step == 3:
            read_only(run)
        return step(self, *arguments)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", closing)
    with without_privileges():
        message = message_of(resume(run))
    assert f"checkpoint-4 could not be written to {run}: Permission denied; " in message
    assert message.endswith(f"go on from {run / 'checkpoint-2'} by --resume")
    run.chmod(0o755)
    check_left(run, 2)
    monkeypatch.undo()
    check_goes_on(run, 2, straight)


def test_a_folder_that_is_read_only_is_refused_at_once(run, straight, read_only):
    messages = []

    def ask():
        with without_privileges(for_good=True):
            messages.append(message_of(resume(run)))

    read_only(run)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(messages) == 1
    assert f"output_dir {run} must be a folder that can be written to" in messages[0]
    run.chmod(0o755)
    check_left(run, 2)


# A disk of its own for one process, where the system gives anyone a name space: nothing of it is left behind.
FILL = """
import os, random, shutil, subprocess, sys
from pathlib import Path
import test_failed_writes as tests
from million_experts.layers import peer

peer.INIT_PAIRS = 2**12
disk, straight, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tests.fill_at_random_moments(disk, straight, random.Random(seed), int(sys.argv[4]))
"""


def resize(disk, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", "tmpfs", str(disk)], check=True)


def fill_at_random_moments(disk, straight, pick, times):
    # What a whole run writes after step 2, in the pages of a file system.
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in straight.rglob("*") if path.is_file())
    needed -= sum(path.stat().st_size for path in (straight / "checkpoint-2").iterdir())
    report.loss_figure = report.usage_figure = lambda *arguments: None
    failed = set()
    for turn in range(times):
        resize(disk, "1g")
        run = at_step_two(straight, disk / "run")
        size = shutil.disk_usage(disk).used + pick.randrange(needed // 4096 - 2) * 4096
        resize(disk, size)
        message = message_of(resume(run, "--report-to", "tensorboard" if turn % 2 else "none"))
        found = re.search(r"Error (.+) could not be written to (\S+): (.+?); ([\d,.]+) MB are free", message)
        assert found, message
        assert found[2] == str(run), message
        assert found[3] in ("No space left on device", "not all of it was taken"), message
        failed.add((found[1], found[3]))
        step = max(number for number, _ in list_checkpoints(run))
        check_left(run, step)
        resize(disk, "1g")
        check_goes_on(run, step, straight)
        shutil.rmtree(run)
    print(*sorted(failed), sep="\n")


def on_a_disk_of_its_own(disk, straight, *numbers, program=FILL):
    if shutil.which("unshare") is None:
        pytest.skip("util-linux's unshare makes the name space for a disk of its own")
    disk.mkdir()
    space = ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs tmpfs {shlex.quote(str(disk))}"
    tried = subprocess.run([*space, "sh", "-c", mount], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"this system mounts no disk for a test: {tried.stderr.strip()}")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = f'{mount} && exec "$@"'
    arguments = [sys.executable, "-c", program, str(disk), str(straight), *map(str, numbers)]
    return subprocess.run(
        [*space, "sh", "-c", command, "sh", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_a_disk_that_is_full_at_some_moment(straight, tmp_path):
    seed = random.randrange(10**6)
    done = on_a_disk_of_its_own(tmp_path / "disk", straight, seed, 2)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"


@pytest.mark.slow
def test_a_disk_that_is_full_at_thirty_moments(straight, tmp_path):
    seed = random.randrange(10**6)
    done = on_a_disk_of_its_own(tmp_path / "disk", straight, seed, 30)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert len(done.stdout.splitlines()) > 3, f"it was always the same that failed: {done.stdout}"


# The same for the number of files: a disk may have room for bytes and none for another name.
FEW_FILES = """
import subprocess, sys
from pathlib import Path
import datasets
import test_failed_writes as tests
from million_experts.layers import peer

peer.INIT_PAIRS = 2**12
disk, straight = Path(sys.argv[1]), Path(sys.argv[2])
datasets.config.HF_DATASETS_CACHE = str(disk / "datasets")
tests.with_ever_more_files(disk, straight, int(sys.argv[3]), int(sys.argv[4]))
"""


def with_ever_more_files(disk, straight, first, stride):
    report.loss_figure = report.usage_figure = lambda *arguments: None
    failed, files = [], first
    while True:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_inodes={files}", "tmpfs", str(disk)], check=True)
        run = disk / "run"
        result = start(straight.parent, run, "--cache-dir", disk / "cache", "--report-to", "tensorboard")
        if result.exit_code == 0:
            break
        message = message_of(result)
        found = re.search(r"Error (.+) could not be written to .*: No space left on device; (.+)\.", message)
        assert found or "cannot be made: No space left on device" in message, message
        if found:
            assert re.search(r"MB are free there, in at most \d+ more files \(df -i\)", found[2]), message
            failed.append(re.sub(r"\d+", "N", found[1]))
        assert not list(run.glob(".*")), "half of it takes room"
        subprocess.run(["umount", "-l", str(disk)], check=True)
        files += stride
    assert losses(run) == losses(straight)
    print(*dict.fromkeys(failed), sep="\n")


def test_a_disk_that_takes_no_more_files(straight, tmp_path):
    done = on_a_disk_of_its_own(tmp_path / "disk", straight, 8, 23, program=FEW_FILES)
    assert done.returncode == 0, done.stderr
    failed = done.stdout.splitlines()
    assert failed[0] == "documents"
    assert len(failed) > 1, "it was always the same that failed"


@pytest.mark.slow
def test_a_disk_that_takes_ever_more_files(straight, tmp_path):
    done = on_a_disk_of_its_own(tmp_path / "disk", straight, 1, 1, program=FEW_FILES)
    assert done.returncode == 0, done.stderr
    wanted = {"the lock of the run", "documents", "tokens", "metrics", "checkpoint-N", "the model"}
    assert wanted <= set(done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        ValueError("not a number"),
        KeyError("weight"),
        WriteError("said already"),
    ],
    ids=repr,
)
def test_other_errors_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, explained("a file", tmp_path):
        raise error
    assert raised.value is error


def test_too_many_open_files_are_not_for_want_of_room(tmp_path):
    message = r"Too many open files; this process may open no more files at once \(ulimit -n\)"
    with pytest.raises(WriteError, match=message), explained("a file", tmp_path):
        raise OSError(24, "Too many open files")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "[enforce fail at inline_container.cc:747] . open file failed with strerror: Disk quota exceeded",
            "Disk",
        ),
        ("Parent directory /a/b does not exist.", "Parent directory /a/b does not exist"),
    ],
)
def test_what_torch_says_of_a_failed_write_is_understood(tmp_path, text, reason):
    with (
        pytest.raises(WriteError, match=f"a file could not be written to .*: {reason}"),
        explained("a file", tmp_path),
    ):
        raise RuntimeError(text)


def test_a_folder_that_was_removed_wants_no_room(tmp_path):
    with (
        pytest.raises(
            WriteError, match=r"could not be written: the folder \S+/a is not there, or no longer$"
        ),
        explained("a file", tmp_path / "a"),
    ):
        (tmp_path / "a" / "b").write_text("")


def test_the_room_of_a_folder_that_is_not_there_yet_is_that_of_its_parent(tmp_path):
    with (
        pytest.raises(WriteError, match=r"written to \S+/a/b: .*; [\d,.]+ MB are free"),
        explained("a file", tmp_path / "a" / "b"),
    ):
        raise OSError(28, "No space left on device")
