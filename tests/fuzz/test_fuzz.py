"""Every boundary is fed input that nobody should send: a minute in all, an hour by `make test-slow`."""

from __future__ import annotations

import os
import sys
import types

import pytest
from hypothesis import strategies as st

from fuzz import BOUNDARIES
from fuzz.harness import Worker, fuzz
from fuzz.robustness_page import BEGIN, END, PAGE, ROWS, read_rows, render


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_input_is_taken_or_refused(boundary):
    tally = fuzz(boundary, 60 / len(BOUNDARIES))
    assert not tally.failure
    assert tally.passed > 0
    assert tally.refused > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_input_is_taken_or_refused_for_an_hour(boundary):
    tally = fuzz(boundary, 3600 / len(BOUNDARIES))
    assert not tally.failure


def test_every_module_that_has_cases_is_a_boundary():
    modules = PAGE.parents[1].glob("tests/fuzz/*.py")
    assert {path.stem for path in modules if "\ncases = " in path.read_text()} == set(BOUNDARIES)


def test_the_page_shows_the_rows():
    text, rows = PAGE.read_text(encoding="utf-8"), read_rows(ROWS)
    assert BEGIN in text
    assert END in text
    assert text == render(text, rows)
    assert [row["boundary"] for row in rows] == list(BOUNDARIES)
    for row in rows:
        assert row["tried"] == row["passed"] + row["refused"] + row["failed"]
        assert row["failed"] == 0


def test_a_case_that_ends_its_process_is_told_from_one_that_fails(tmp_path, monkeypatch):
    package = tmp_path / "fuzz"
    package.mkdir()
    (package / "lethal.py").write_text(
        "import os, signal\n"
        "def attempt(case):\n"
        "    if case == 'die': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if case == 'exit': os._exit(3)\n"
        "    if case == 'fail': raise KeyError('x')\n"
        "    if case == 'refuse': raise ValueError('no')\n"
    )
    import fuzz as package_of_tests

    code = f"import fuzz; fuzz.__path__.append({str(package)!r})\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.path.dirname(package_of_tests.__path__[0])])
    )
    worker = Worker("lethal")
    try:
        results = [worker.attempt(case)[0] for case in ("live", "die", "fail", "exit", "refuse", "live")]
    finally:
        worker.close()
    assert results == ["passed", "died", "failed", "died", "refused", "passed"]


def test_a_failure_ends_the_run_and_is_made_small(monkeypatch):
    def attempt(worker: Worker, case: int) -> tuple[str, str]:
        return ("failed", "too large") if case > 9 else ("passed" if case > 4 else "refused", "")

    boundary = types.ModuleType("fuzz.numbers")
    boundary.cases = st.integers(0, 1000)
    monkeypatch.setitem(sys.modules, "fuzz.numbers", boundary)
    monkeypatch.setattr(Worker, "start", lambda worker: None)
    monkeypatch.setattr(Worker, "attempt", attempt)
    tally = fuzz("numbers", 60)
    assert tally.failed > 0
    assert tally.failure == f"numbers, seed {tally.seeds - 1}: 10\ntoo large"
