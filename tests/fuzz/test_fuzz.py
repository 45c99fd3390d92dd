"""Every boundary is fed input that nobody should send: a minute in all, an hour by `make test-slow`."""

from __future__ import annotations

import os

import pytest

from fuzz.harness import Worker, fuzz

BOUNDARIES = ("entries", "operations", "layers", "optimiser_states")
SECONDS = 60 / len(BOUNDARIES)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_input_is_taken_or_refused(boundary):
    counts = fuzz(boundary, SECONDS)
    assert counts["passed"] > 0
    assert counts["refused"] > 0
    print(boundary, dict(counts))


@pytest.mark.slow
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_input_is_taken_or_refused_for_an_hour(boundary):
    counts = fuzz(boundary, 3600 / len(BOUNDARIES))
    print(boundary, dict(counts))


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
