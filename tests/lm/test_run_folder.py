"""A run's folder belongs to one process, and is made of files and folders alone."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import socket
import stat
from pathlib import Path

import pytest

from million_experts.lm import run_folder
from million_experts.lm.files import WriteError, remove_scratch, save_whole, scratch_folder, write_whole
from million_experts.lm.locks import locked
from million_experts.lm.run_folder import RunInUseError, hold

CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a folder until it is killed."""
    run = tmp_path / "held"
    run.mkdir()
    ready = CONTEXT.Event()

    def work():
        with hold(run), scratch_folder(run) as scratch:
            (scratch / "half").touch()
            ready.set()
            CONTEXT.Event().wait(60)

    process = CONTEXT.Process(target=work)
    process.start()
    assert ready.wait(60)
    yield run, process
    process.kill()
    process.join(60)


def test_a_second_process_is_told_who_holds_the_folder(holder):
    run, process = holder
    before = sorted(run.rglob("*"))
    with pytest.raises(RunInUseError) as raised, hold(run):
        pytest.fail("two processes in one folder")
    place = f"process {process.pid} on {socket.gethostname()}"
    assert str(raised.value).startswith(f"output_dir {run} is in use: {place} has trained in it since ")
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\. Wait for it or", str(raised.value))
    assert sorted(run.rglob("*")) == before, "what the other one is writing"


def test_the_folder_of_a_killed_process_is_taken_over(holder):
    run, process = holder
    process.kill()
    process.join(60)
    assert len(list(run.iterdir())) == 3, "its lock, its name and its scratch folder"
    with hold(run) as check:
        check()
        assert sorted(path.name for path in run.iterdir()) == [".run.holder", ".run.lock"]
    assert list(run.iterdir()) == []


def test_a_folder_that_is_let_go_is_free(tmp_path):
    for _ in range(2):
        with hold(tmp_path):
            pass
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError("of the one who holds it")
    with pytest.raises(TimeoutError), hold(tmp_path):
        raise TimeoutError("of the one who holds it, not of the lock")
    assert list(tmp_path.iterdir()) == []


def test_many_processes_hold_it_one_after_the_other(tmp_path):
    # The lock's file is removed each time while others wait for it.
    count = tmp_path / "count"
    count.write_text("0")

    def work():
        for _ in range(25):
            with locked(tmp_path / "lock"):
                number = int(count.read_text())
                count.write_text(str(number + 1))

    processes = [CONTEXT.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert count.read_text() == "100"
    assert list(tmp_path.iterdir()) == [count]


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_folder_that_is_gone_is_found_out(tmp_path, how):
    run = tmp_path / "run"
    run.mkdir()
    with hold(run) as check:
        check()
        if how == "renamed":
            run.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(run)
        if how == "replaced":
            run.mkdir()
            other = hold(run)
            other.__enter__()
        with pytest.raises(WriteError, match=f"the folder of the run, {run}, was removed, renamed or given"):
            check()
    if how == "replaced":
        assert sorted(path.name for path in run.iterdir()) == [".run.holder", ".run.lock"], "the other's"
        other.__exit__(None, None, None)


LINKS = [
    ".partial",
    "checkpoint-5",
    "model.safetensors",
    "runs",
    ".run.lock",
    ".run.holder",
    "a/b/tokens",
    "dead",
]


@pytest.mark.parametrize("name", LINKS)
def test_links_in_the_folder_are_refused_and_what_they_name_stays(tmp_path, name):
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(tmp_path / "nothing" if name == "dead" else mine)
    with pytest.raises(ValueError, match=re.escape(f"{run} holds {name}, which is a link to ")), hold(run):
        pytest.fail("it may write through the link")
    assert (run / name).is_symlink()
    assert [path.name for path in mine.iterdir()] == ["thesis"]
    assert (mine / "thesis").read_text() == "mine"


def test_pipes_are_refused_and_not_waited_for(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    os.mkfifo(tmp_path / "checkpoint-2" / "trainer_state.json")
    pipe = r"holds checkpoint-2/trainer_state\.json, which is neither a file nor a folder"
    with pytest.raises(ValueError, match=pipe), hold(tmp_path):
        pytest.fail("a pipe is read for ever")


def test_a_folder_may_be_reached_by_a_link_of_the_users_own(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with hold(tmp_path / "run"):
        assert len(list((tmp_path / "disk").iterdir())) == 2


def test_a_file_under_two_names_changes_under_one(tmp_path):
    # An archive may name a file of the user's as its own: it can be replaced, not written to.
    names = ["results.json", "model", ".run.lock", ".run.holder"]
    mine, run = tmp_path / "mine", tmp_path / "run"
    run.mkdir()
    mine.write_text("mine")
    mine.chmod(0o640)
    for name in names:
        os.link(mine, run / name)
    with hold(run):
        write_whole(run / "results.json", "{}")
        save_whole(lambda folder: (Path(folder) / "model").write_text("weights"), run)
    assert mine.read_text() == "mine"
    assert (run / "model").read_text() == "weights"
    assert stat.S_IMODE(mine.stat().st_mode) == 0o640


def test_what_is_written_meanwhile_has_a_name_that_nobody_can_lay_a_link_under(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr("secrets.token_hex", lambda count: "known")
    (run / ".partial-known-results.json").symlink_to(mine)
    with pytest.raises(WriteError, match="File exists"):
        write_whole(run / "results.json", "{}")
    assert mine.read_text() == "mine"


def test_scratch_that_is_a_link_is_removed_and_not_what_it_names(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    run = tmp_path / "run"
    (run / ".partial-x").mkdir(parents=True)
    (run / ".partial-x" / "inner").symlink_to(mine)
    (run / ".partial").symlink_to(mine)
    remove_scratch(run)
    assert list(run.iterdir()) == []
    assert (mine / "thesis").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_new_files_have(tmp_path, umask):
    def save(folder):
        for name, mode in (("private", 0o600), ("open", 0o666)):
            handle = os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY, mode)
            os.close(handle)

    before = os.umask(umask)
    try:
        save_whole(save, tmp_path)
        write_whole(tmp_path / "whole", "text")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("private", "open", "whole"), 0o666 & ~umask)


def test_a_folder_that_takes_no_more_files_is_said_so(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(run_folder, "locked", lambda *arguments, **options: (_ for _ in ()).throw(full))
    with (
        pytest.raises(WriteError, match=r"the lock of the run could not be written to .*No space left"),
        hold(tmp_path),
    ):
        pytest.fail("without a lock")
