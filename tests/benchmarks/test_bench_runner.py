"""A case from end to end, at sizes that take no time."""

from __future__ import annotations

import dataclasses
import json
import sys

import bench_competitors
import pytest
import torch
from typer.testing import CliRunner

from million_experts import cli
from million_experts.benchmarks import memory, peers, runner, session, timing
from million_experts.benchmarks.case import OURS, REFERENCE
from million_experts.benchmarks.correctness import compare
from million_experts.benchmarks.report import markdown, merge, read_rows, write_results
from million_experts.benchmarks.runner import CaseRunner, Effort
from million_experts.benchmarks.targets import Target
from million_experts.benchmarks.timing import interleave, summarise
from million_experts.benchmarks.workload import Competitor, Unavailable

EFFORT = Effort(repetitions=3, limit=1.0)


def run(case):
    return CaseRunner(case, EFFORT, threads=1).run()


def off(tiny_layers, what):
    ours = next(c for c in tiny_layers() if c.name == OURS)
    return Competitor("off", bench_competitors.off, {**ours.arguments, "what": what}, ours.truth, "PEER")


# Correctness comes before time.


def test_all_competitors_of_a_case_are_measured(tiny_case):
    rows = run(tiny_case())
    assert {row["phase"] for row in rows} == {"forward", "backward", "step"}
    for row in rows:
        if row["competitor"] != "PEER-pytorch":
            assert row["status"] == "measured", row
            assert 0 < row["q1_s"] <= row["median_s"] <= row["q3_s"]
            assert row["repetitions"] == 3
    assert len({row["competitor"] for row in rows}) == 7


@pytest.mark.parametrize(
    ("what", "message"),
    [("output", "output differs"), ("gradient", "gradient of"), ("nan", "not finite"), ("shape", "shape")],
)
def test_a_wrong_result_is_not_timed_and_neither_is_its_case(tiny_case, tiny_layers, what, message):
    rows = run(tiny_case(off(tiny_layers, what)))
    for row in rows:
        if row["competitor"] != "PEER-pytorch" or row["status"] != "absent":
            assert row["status"] == "refused", row
        assert row["median_s"] is None
        assert row["repetitions"] == 0
    assert all(message in row["reason"] for row in rows if row["competitor"] == "off")


def test_a_right_result_passes(tiny_case, tiny_layers):
    assert {r["status"] for r in run(tiny_case(off(tiny_layers, "nothing")))} <= {"measured", "absent"}


def test_what_breaks_or_is_missing_stays_in_the_table_with_its_reason(tiny_case, monkeypatch):
    monkeypatch.setitem(sys.modules, "PEER_pytorch", None)
    rows = run(tiny_case(Competitor("broken", bench_competitors.broken), phases=("forward",)))
    by_name = {row["competitor"]: row for row in rows}
    assert by_name["broken"]["status"] == "failed"
    assert by_name["broken"]["reason"] == "RuntimeError: it broke"
    assert by_name["PEER-pytorch"]["status"] == "absent"
    assert by_name[OURS]["status"] == "measured"
    table = markdown(rows)
    assert "PEER-pytorch, forward: absent: PEER-pytorch cannot be imported" in table


def test_what_does_not_fit_is_skipped_with_the_sizes(tiny_case, monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    monkeypatch.setattr(runner, "available_memory", lambda: 2**16)
    rows = run(tiny_case())
    skipped = [row for row in rows if row["status"] == "skipped"]
    assert skipped
    assert all("GiB are available" in row["reason"] for row in skipped)
    assert any(row["status"] == "measured" for row in rows), "those that come first stay"


def test_tokens_whose_experts_tie_are_left_out(tiny_layers):
    ours, reference = (next(c for c in tiny_layers(64) if c.name == n) for n in (OURS, REFERENCE))
    shared = {}
    truth = reference.build(shared, **reference.arguments)
    with torch.no_grad():
        truth.module.keys1[1:] = truth.module.keys1[0]  # every expert has equals
    inputs = truth.draw(torch.Generator().manual_seed(0))
    assert bool(truth.ambiguous(inputs, False).any())
    with torch.no_grad():
        truth.module.keys1.normal_()
    assert not bool(truth.ambiguous(inputs, True).all())
    assert compare(ours.build(shared, **ours.arguments), truth, True) is None


def test_drawing_the_comparison_leaves_statistics_alone(tiny_layers):
    reference = next(c for c in tiny_layers() if c.name == REFERENCE)
    truth = reference.build({}, **reference.arguments)
    before = {name: value.clone() for name, value in truth.module.named_buffers()}
    truth.ambiguous(truth.draw(torch.Generator()), True)
    assert all(torch.equal(before[name], value) for name, value in truth.module.named_buffers())


# Time.


def test_turns_are_taken_and_each_round_starts_with_another():
    calls = []

    def make(name, seconds):
        def run(count):
            calls.append((count, name))
            return seconds

        return run

    runs = {"a": make("a", 0.1), "b": make("b", 5.0), "c": make("c", 0.1)}
    times = dict(interleave(runs, repetitions=6, limit=12.0))
    assert {name: len(t) for name, t in times.items()} == {"a": 6, "b": 3, "c": 6}
    assert [name for _, name in calls[:9]] == list("abcbcacab")
    assert [count for count, _ in calls] == sorted(count for count, _ in calls)
    slow = dict(interleave({"s": make("s", 100.0)}, repetitions=20, limit=1.0))
    assert len(slow["s"]) == 3, "three at least"


def test_a_cold_case_empties_the_caches_before_each_iteration_and_no_other_does(tiny_case, monkeypatch):
    litter = torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(timing, "_litter", lambda: litter)
    case = tiny_case(phases=("forward",))
    run(case)
    assert litter == 0
    rows = run(dataclasses.replace(case, cold=True))
    assert litter >= sum(row["repetitions"] for row in rows) > 0


def test_median_and_quartiles():
    times = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (times.q1, times.median, times.q3, times.repetitions) == (2.0, 3.0, 4.0, 5)


# Memory.

needs_peaks = pytest.mark.skipif(not memory.can_measure(), reason="needs Linux's /proc/self/clear_refs")


@needs_peaks
@pytest.mark.parametrize("phases", [("forward",), ("forward", "backward", "step")])
def test_a_known_need_of_memory_is_seen(phases):
    competitor = Competitor("hoard", bench_competitors.hoard, {"megabytes": 80, "tokens": 4})
    peaks = memory.measure_peaks(competitor, phases, threads=1)
    assert list(peaks) == list(phases)
    for peak in peaks.values():
        # The kernel counts pages in batches for each thread: a few are missing.
        assert 79.5 <= peak.added / 2**20 < 90


@needs_peaks
def test_gradients_and_moments_count():
    shape = {"tokens": 8, "dim": 256, "num_experts": 128**2, "K": 4, "dtype": "float32", "picks": "uniform"}
    competitor = Competitor("experts", bench_competitors.table, shape)
    peaks = memory.measure_peaks(competitor, ("forward", "backward", "step"), threads=1)
    table = 128**2 * 2 * 256 * 4
    assert peaks["forward"].added < table / 2
    assert 0.99 * table <= peaks["backward"].added < 2 * table
    # The gradient, two moments, and AdamW's temporaries.
    assert 3 * table <= peaks["step"].added < 6 * table


@needs_peaks
def test_a_process_that_fails_says_why():
    with pytest.raises(Unavailable, match="RuntimeError: it broke"):
        memory.measure_peaks(Competitor("broken", bench_competitors.broken), ("forward",), 1)


def test_the_estimate_knows_shared_weights(tiny_layers):
    ours = tiny_layers()[0]
    kept, working = memory.estimate_bytes(ours, "forward")
    weights = sum(p.numel() * 4 for p in peers.PEER(16, 64, 2, 3, 8).parameters())
    assert kept == weights
    assert memory.estimate_bytes(ours, "forward", frozenset({ours.share_key}))[0] == 0
    assert memory.estimate_bytes(ours, "step")[0] == 3 * weights
    assert memory.estimate_bytes(ours, "backward")[1] >= working + weights


# Files and the command.


@pytest.fixture
def tiny_bench(tiny_case, monkeypatch):
    """`million-experts bench` with two tiny cases, one with a target, in place of its own."""
    target = Target("tiny", "over dense", "P1", "step", OURS, ("dense",), 1e9)
    case = dataclasses.replace(tiny_case(), name="P1", targets=(target,), group="P1")
    other = dataclasses.replace(tiny_case(), name="N=128^2", group="N", phases=("forward",))
    monkeypatch.setattr("million_experts.benchmarks.cases.CASES", (case, other))
    monkeypatch.setattr("million_experts.benchmarks.report.TARGETS", (target,))
    return case, other


def bench(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def test_results_are_written_with_where_they_come_from(tiny_bench, tmp_path):
    result = bench("--output", tmp_path / "b", "--repetitions", 3, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "tiny" in result.stdout
    rows = read_rows(tmp_path / "b")
    assert {row["case"] for row in rows} == {"P1", "N=128^2"}
    for row in rows:
        assert {"commit", "dirty", "machine", "versions", "threads", "backend", "measured_at"} <= set(row)
        assert row["versions"]["torch"] == torch.__version__
        assert row["machine"]["memory_bytes"] > 2**28
        assert row["shape"]["tokens"] == 6
        assert row["dtype"] == "float32"
    table = (tmp_path / "b" / "results.md").read_text()
    assert table.index("## Targets") < table.index("### P1: a tiny case")
    assert "| met | dense |" in table
    assert (tmp_path / "b" / "targets.png").exists()
    assert "![targets](targets.png)" in table


def test_other_cases_results_stay(tiny_bench, tmp_path):
    bench("--output", tmp_path, "--repetitions", 3, "--cases", "N")
    first = read_rows(tmp_path)
    assert bench("--output", tmp_path, "--repetitions", 3, "--cases", "P1").exit_code == 0
    rows = read_rows(tmp_path)
    assert [row for row in rows if row["case"] != "P1"] == first
    assert {row["case"] for row in rows} == {"P1", "N=128^2"}


def test_an_interrupted_run_leaves_what_it_finished(tiny_bench, tmp_path, monkeypatch):
    class Interrupted(CaseRunner):
        def run(self):
            if self.case.name != "P1":
                raise KeyboardInterrupt
            return super().run()

    monkeypatch.setattr(session, "CaseRunner", Interrupted)
    result = bench("--output", tmp_path, "--repetitions", 3)
    assert result.exit_code == 130
    assert {row["case"] for row in read_rows(tmp_path)} == {"P1"}
    assert (tmp_path / "targets.png").exists()


def test_a_wrong_result_fails_the_command(tiny_bench, tiny_layers, tmp_path, monkeypatch):
    case = dataclasses.replace(tiny_bench[0], competitors=(*tiny_layers(), off(tiny_layers, "output")))
    monkeypatch.setattr("million_experts.benchmarks.cases.CASES", (case,))
    result = bench("--output", tmp_path, "--repetitions", 3)
    assert result.exit_code == 1
    assert "wrong results, not timed: P1, off: output differs" in result.stderr
    assert {row["status"] for row in read_rows(tmp_path)} <= {"refused", "absent"}


def test_a_case_that_breaks_does_not_end_the_run(tiny_bench, tmp_path, monkeypatch):
    class Breaking(CaseRunner):
        def _run_phase(self, phase):
            if self.case.name == "P1":
                raise RuntimeError("out of luck")
            return super()._run_phase(phase)

    monkeypatch.setattr(session, "CaseRunner", Breaking)
    result = bench("--output", tmp_path, "--repetitions", 3)
    assert result.exit_code == 0
    by_case = {row["case"]: row for row in read_rows(tmp_path)}
    assert by_case["P1"]["status"] == "failed"
    assert by_case["P1"]["reason"] == "RuntimeError: out of luck"
    assert by_case["N=128^2"]["status"] in ("measured", "absent")


def test_check_passes_on_its_own_results_and_fails_on_better_ones(tiny_bench, tmp_path):
    bench("--output", tmp_path, "--repetitions", 3, "--cases", "P1")
    written = (tmp_path / "results.jsonl").read_text()
    result = bench("--check", tmp_path, "--repetitions", 3, "--margin", 100)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "results.jsonl").read_text() == written, "a check writes nothing"
    rows = read_rows(tmp_path)
    for row in rows:
        if row["competitor"] == OURS:
            row.update({key: row[key] / 1e4 for key in ("median_s", "q1_s", "q3_s")})
    write_results(rows, tmp_path)
    result = bench("--check", tmp_path / "results.jsonl", "--repetitions", 3)
    assert result.exit_code == 1
    assert "worse than in" in result.stderr
    assert "by more than 25%: tiny" in result.stderr
    write_results([row for row in rows if row["competitor"] == OURS], tmp_path)
    result = bench("--check", tmp_path, "--repetitions", 3)
    assert result.exit_code == 1
    assert "none of the ratios could be compared" in result.stderr


def test_bad_arguments_are_refused_in_a_line(tmp_path):
    assert "cases must be names among P1, P1g" in bench("--cases", "P11").stderr
    assert bench("--cases", "P11").exit_code == 1
    assert "no results of a benchmark" in bench("--check", tmp_path / "none").stderr
    (tmp_path / "results.jsonl").write_text('{"case": 1}\n')
    assert "line 1 of" in bench("--check", tmp_path).stderr
    assert bench("--repetitions", "1").exit_code == 2


def test_merge_keeps_the_order_of_the_cases():
    rows = [{"case": name} for name in ("N=128^2", "P2", "unheard of")]
    assert [row["case"] for row in merge(rows, [{"case": "P1"}, {"case": "P2", "new": True}])] == [
        "P1",
        "P2",
        "N=128^2",
        "unheard of",
    ]


def test_rows_are_plain_json(tiny_case):
    for row in run(tiny_case(phases=("forward",))):
        assert json.loads(json.dumps(row)) == row
