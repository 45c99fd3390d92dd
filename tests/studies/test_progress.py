"""How long runs are expected to take."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from million_experts.lm.training import model_config
from million_experts.studies import progress as module
from million_experts.studies.flops import training_flops_per_token
from million_experts.studies.progress import Pace, StudyProgress, format_duration
from million_experts.studies.runs import Run

MACHINE = {
    "machine": {"cpu": "this", "cores": 2, "instruction_set": "AVX2", "memory_bytes": 2**34, "system": "one"},
    "threads": 2,
}


@pytest.fixture
def run(tiny_settings):
    return Run("a study", "one", tiny_settings(), {"method": "peer"})


def finished(method, flops, seconds, **changes):
    row = {"labels": {"method": method}, "flops": {"total": flops}, "seconds": seconds - 1, **MACHINE}
    return {**row, "measuring_seconds": 1, "status": "finished", **changes}


def test_a_run_takes_as_long_per_flop_as_the_finished_ones_of_its_method(run):
    pace = Pace(
        [finished("peer", 1e9, 10), finished("dense", 1e9, 2), finished("peer", 3e9, 10)],
        MACHINE,
        run.settings,
    )
    assert pace.seconds(run) == pytest.approx(run.flops * 20 / 4e9)
    assert pace.seconds_per_flop("dense") == pytest.approx(2 / 1e9)
    assert pace.seconds_per_flop("moe") == pytest.approx(22 / 5e9)
    assert pace.source == "by 3 finished runs"


def test_other_machines_and_diverged_runs_do_not_count(run, monkeypatch):
    monkeypatch.setattr(module, "training_flops_per_second", lambda settings: 1e9)
    diverged = {"labels": {}, "flops": {"total": 1e9}, "status": "diverged", **MACHINE}
    pace = Pace([finished("peer", 1e9, 10, threads=64), diverged], MACHINE, run.settings)
    assert pace.seconds(run) == pytest.approx(run.flops / 1e9)
    assert "guess" in pace.source


def test_another_start_of_the_same_machine_counts_and_another_processor_does_not(run):
    again = {**MACHINE["machine"], "memory_bytes": 2**34 - 4096, "system": "two"}
    other = {**MACHINE["machine"], "cpu": "other"}
    rows = [finished("peer", 1e9, 10, machine=again), finished("peer", 1e9, 1000, machine=other)]
    assert Pace(rows, MACHINE, run.settings).seconds(run) == pytest.approx(run.flops * 10 / 1e9)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_quick_measure_is_a_speed(tiny_settings, precision):
    assert 1e6 < module.training_flops_per_second(tiny_settings(precision=precision)) < 1e16


def test_an_accelerator_that_is_named_but_not_there_is_not_measured(tiny_settings, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert module.training_flops_per_second(tiny_settings()) > 0


def test_the_quick_measure_is_the_best_of_its_steps_of_a_dense_model(tiny_settings, monkeypatch):
    settings = tiny_settings(mlp_layer_types="peer", peer={"num_experts": 2**40})  # which nothing could hold
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    dense = model_config(settings.with_overrides({"mlp_layer_types": "dense"}), settings.vocab_size)
    tokens = module.PROBE_TOKENS // settings.context * settings.context
    flops = tokens * training_flops_per_token(dense, settings.context).total
    assert module.training_flops_per_second(settings) == pytest.approx(flops / 2.0)


def test_time_left_counts_the_runs_to_come(run):
    out = io.StringIO()
    pace = Pace([finished("peer", run.flops, 100)], MACHINE, run.settings)
    with StudyProgress(Console(file=out, width=200), [run, run], pace, later_flops=3 * run.flops) as progress:
        progress.begin(run)
        progress.step(6, 12)
        assert progress._time_left(0.5) == "8 min left"  # 450 s
        row = {"validation": {"loss": 2.5}} | finished("peer", run.flops, 300)
        progress.end(run, row)
    assert "1/2 one: validation 2.5000 nats, 299 s; 13 min left" in out.getvalue()  # 200 s each, four of them


def test_a_terminal_gets_bars(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    pace = Pace([finished("peer", run.flops, 100)], MACHINE, run.settings)
    with StudyProgress(console, [run], pace) as progress:
        progress.begin(run)
        progress.step(6, 12)
        progress._bar.refresh()
    assert "step 6/12" in out.getvalue()
    assert "50 s left" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(12.3, "12 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_are_readable(seconds, text):
    assert format_duration(seconds) == text
