"""The snippets of docs/how-to run, on a tiny model in the place of the demo's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from interop_page import ROOT

pytest.importorskip("peft", reason="needs the extra `interop`")

PAGES = sorted(path.name for path in (ROOT / "docs/how-to").glob("*.md"))
FRESH = ["hub-folder.md"]  # what it shows is for a process that has not imported us


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs/how-to" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def reader(make_model, tokenizer, tmp_path, monkeypatch):
    """A folder in which `runs/demo` is a saved model."""
    make_model().save_pretrained(tmp_path / "runs/demo")
    tokenizer.save_pretrained(tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(command: list[str], folder) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in FRESH and blocks(page, "python")])
def test_python_blocks_run_in_order(page, reader):
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), scope)


@pytest.mark.parametrize("page", FRESH)
def test_python_blocks_run_in_a_process_of_their_own(page, reader):
    run([sys.executable, "-c", "\n".join(blocks(page, "python"))], reader)


def test_the_commands_run(reader):
    """The one with a task of the reader's own; the others want a data set of a hub."""
    page = "lm-eval.md"
    (reader / "tasks").mkdir()
    (reader / "tasks/capitals.yaml").write_text(*blocks(page, "yaml"))
    (reader / "tasks/capitals.jsonl").write_text(*blocks(page, "json"))
    commands = [line for block in blocks(page, "console") for line in block.splitlines()]
    assert all(line.startswith("lm_eval run ") for line in commands)
    (command,) = (line for line in commands if "--include_path" in line)
    run([sys.executable, "-m", *shlex.split(command)], reader)


def test_links_lead_somewhere():
    for page in (*PAGES, "../interoperability.md"):
        folder = ROOT / "docs/how-to"
        links = re.findall(r"\]\((?!http)([^)#]+)", (folder / page).read_text(encoding="utf-8"))
        for link in links:
            assert (folder / page).parent.joinpath(link).exists(), (page, link)
