"""A run of the GPU check: its plan fits the minutes; rows and a summary are left whatever a part does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from million_experts.benchmarks.gpu import __main__ as command
from million_experts.benchmarks.gpu import costs, plan, rows, summary, supervise
from million_experts.benchmarks.gpu.plan import Case

HERE = Path(__file__).parent


def test_the_plan_fits_the_minutes_by_three_times_the_roofline():
    cases, before = plan.make_plan(text="text"), 0.0
    assert plan.SLACK == 3
    taken, limits = plan.expected(cases), plan.budget(8)
    for part in plan.PARTS:
        assert taken[part] <= limits[part] - before, part
        before = limits[part]
    assert limits["learns"] < 8 * 60
    assert sum(case.seconds() for case in cases) >= 3 * sum(case.roofline() for case in cases)


def test_the_plan_names_each_case_once_and_counts_it():
    for cases in (plan.make_plan(text="text"), plan.make_plan(rehearsal=True, text="text")):
        names = Counter((case.part, case.name) for case in cases)
        assert set(names.values()) == {1}
        assert list(dict.fromkeys(case.part for case in cases)) == list(plan.PARTS)
        json.dumps([case.arguments for case in cases])
        assert all(case.seconds() > 0 for case in cases)
        assert all(case.cost.bytes > 0 for case in cases if case.part in ("right", "fast"))
    assert not [case for case in plan.make_plan() if case.part == "learns"]


def test_the_plan_has_what_the_check_is_for():
    """Pools of 128^2 to 2048^2, widths of 256 to 2048, one token and 1,024 to 32,768, two types."""
    cases = [case for case in plan.make_plan() if case.function == "layers"]
    shapes = [case.arguments["shape"] for case in cases]
    assert {s["n"] for s in shapes} == {128, 256, 512, 1024, 2048}
    assert {s["D"] for s in shapes} == {256, 512, 1024, 2048}
    assert {s["T"] for s in shapes} == {1, 1024, 8192, 32768}
    assert {s["dtype"] for s in shapes} == {"bfloat16", "float32"}
    right = [case for case in plan.make_plan() if case.part == "right"]
    assert any("N" in a and a["N"] * 2 * a["D"] > 2**31 for a in (case.arguments for case in right))
    assert {case.arguments.get("dtype") for case in right} >= {"float32", "bfloat16", "float16"}


def test_limits_of_some_parts_share_the_minutes():
    limits = plan.budget(10, ("fast", "why"))
    assert list(limits) == ["fast", "why"]
    assert limits["why"] == pytest.approx(0.97 * 600)


def test_dry_run_prints_the_plan_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--dry-run", "--only", "right,fast"]) == 0
    printed = capsys.readouterr().out
    for case in plan.make_plan():
        assert (case.name[:80] in printed) == (case.part in ("right", "fast"))
    assert "fast: until" in printed
    assert "s of 480 expected: 3 times the roofline" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "right,quick"], "--only takes parts of right, fast, why, learns, got ['quick']"),
        (["--only", ","], "--only takes parts"),
        (["--only", "learns"], "--only learns needs --text"),
        (["--minutes", "0"], "--minutes must be positive, got 0.0"),
        (["--text", "nowhere.txt"], "--text must be a file, got nowhere.txt"),
    ],
)
def test_bad_arguments_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err


def test_rows_are_whole_lines_after_one_that_was_cut_off(tmp_path):
    file = rows.Rows(tmp_path, "run")
    file.write({"part": "right", "case": "a", "error": float("nan"), "many": {"x": [float("inf"), 1.0]}})
    with file.path.open("a") as half:
        half.write('{"part": "ri')
    file.write({"part": "right", "case": "b"})
    found = rows.read(tmp_path)
    assert [row["case"] for row in found] == ["a", "b"]
    assert found[0]["error"] is None
    assert found[0]["many"] == {"x": [None, 1.0]}
    assert found[1]["run"] == "run"


def test_resume_leaves_out_what_the_same_source_has_ended(tmp_path):
    for run, source in (("first", "abc"), ("other", "def")):
        file = rows.Rows(tmp_path, run)
        file.write({"part": "run", "source": source, "rehearsal": False})
        file.write({"part": "right", "case": run, "event": "begin"})
        file.write({"part": "right", "case": run, "event": "end", "status": "died"})
        file.write({"part": "right", "case": "begun", "event": "begin"})
    found = rows.read(tmp_path)
    assert rows.finished(found, "abc", False) == {("right", "first")}
    assert rows.finished(found, "abc", True) == set()


def test_of_each_case_the_latest_row_counts():
    found = [
        {"part": "right", "case": "a", "status": "wrong"},
        {"part": "right", "case": "a", "event": "end", "status": "failed"},
        {"part": "right", "case": "a", "event": "begin"},
        {"part": "right", "case": "a", "status": "right"},
        {"part": "right", "case": "a", "event": "end"},
        {"part": "run"},
    ]
    assert [row["status"] for row in rows.latest(found)] == ["right"]
    assert not summary.failed(found)
    assert summary.failed(found[:2])


def test_a_header_says_what_ran():
    head = rows.header(None, True, ["--rehearse"])
    assert head["source"] == rows.source_digest()
    assert len(head["source"]) == 12
    assert head["versions"]["torch"]
    assert rows.header("abc", False, [])["commit"] == "abc"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose worker is `gpu_worker.py`; a part's name says what its cases do."""
    monkeypatch.setattr(supervise, "WORKER", "gpu_worker")
    monkeypatch.setattr(
        supervise, "make_plan", lambda *_: [Case(p, "hangs", "f") for p in ("hangs", "dies, hangs")]
    )
    monkeypatch.setattr(Case, "patience", lambda self: 1.0)
    path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)

    def make(*parts: str, seconds: float = 60.0):
        limits = {part: seconds * (i + 1) for i, part in enumerate(parts)}
        return supervise.Run(rows.Rows(tmp_path, "run"), limits, True, False, None, lambda _: None)

    return make


def statuses(path: Path) -> dict[tuple[str, str], str | None]:
    return {(r["part"], r["case"]): r.get("status") for r in rows.read(path) if r.get("event") == "end"}


def test_a_process_that_dies_or_hangs_costs_one_case(run, tmp_path):
    run("dies, hangs", "after").parts()
    part = "dies, hangs"
    assert statuses(tmp_path) == {
        (part, "good"): None,
        (part, "dies"): "died",
        (part, "hangs"): "hung",
        (part, "last"): None,
        ("after", "good"): None,
        ("after", "after"): None,
        ("after", "last"): None,
    }
    faults = [row["fault"] for row in rows.read(tmp_path) if "fault" in row]
    assert "exit status 139: Segmentation fault" in faults[0]
    assert "no end after 1 s" in faults[1]


def test_a_part_that_cannot_start_is_given_up(run, tmp_path):
    run("no start", "after").parts()
    (failed,) = [row for row in rows.read(tmp_path) if row.get("status") == "failed"]
    assert failed["fault"] == "an import failed"
    assert ("after", "last") in statuses(tmp_path)


def test_without_a_gpu_the_run_ends(run):
    with pytest.raises(RuntimeError, match="there is no GPU"):
        run("no GPU", "after").parts()


def test_time_that_is_up_ends_a_part_and_not_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Case, "patience", lambda self: 60.0)
    start = time.monotonic()
    run("hangs", "after", seconds=2.0).parts()
    assert time.monotonic() - start < 15
    found = statuses(tmp_path)
    assert ("hangs", "hangs") not in found  # `--resume` begins it again
    assert ("after", "last") in found


def test_a_signal_ends_the_run_and_its_process(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Case, "patience", lambda self: 60.0)
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    with supervise.stoppable(), pytest.raises(supervise.Stopped, match="SIGTERM"):
        run("hangs").parts()
    assert signal.getsignal(signal.SIGTERM) is before
    assert statuses(tmp_path).keys() == {("hangs", "good")}
    listed = subprocess.run(["pgrep", "-f", f"gpu_worker.*{tmp_path}"], capture_output=True, check=False)
    assert listed.stdout == b""


def test_a_summary_is_left_when_the_run_is_stopped(tmp_path, monkeypatch, capsys):
    def stopped(self):
        self.file.write({"part": "right", "case": "a", "event": "end", "status": "died", "fault": "killed"})
        raise supervise.Stopped("SIGTERM")

    monkeypatch.setattr(supervise.Run, "parts", stopped)
    assert command.main(["--rehearse", "--output", str(tmp_path)]) == 130
    assert "Summary (stopped by SIGTERM)" in capsys.readouterr().out
    text = (tmp_path / command.SUMMARY).read_text()
    assert "DIED: right a: killed" in text
    assert "not reached, `--resume` goes on there: right experts by token" in text


def test_a_wrong_result_fails_the_command(tmp_path, monkeypatch):
    def parts(self):
        self.file.write({"part": "right", "case": "a", "status": status, "error": 0.0})

    monkeypatch.setattr(supervise.Run, "parts", parts)
    for status, code in (("right", 0), ("wrong", 1), ("out of memory", 0)):
        assert command.main(["--rehearse", "--output", str(tmp_path / status)]) == code


def test_the_run_needs_nothing_but_torch():
    """Nor is anything drawn unless pages are made."""
    modules = ("__main__", "worker", "right", "right_layer", "fast", "why", "learns", "compiling")
    script = "import sys\n" + "".join(f"import million_experts.benchmarks.gpu.{m}\n" for m in modules)
    script += (
        "foreign = ('matplotlib', 'beartype', 'psutil', 'transformers', 'typer', 'rich', 'yaml', 'scipy')\n"
        "print([name for name in foreign if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_least_costs_are_sums_of_those_of_operations():
    shape = costs.Shape(8192, 1024, 256)
    names = ("retrieval, forward", "experts, forward")
    once = [costs.operation(name, shape) for name in names]
    forward = costs.layer(shape, "forward", True)
    assert forward.bytes > sum(c.bytes for c in once)
    assert forward.flops == sum(c.flops for c in once) + 2 * 8192 * 256 * 8 * 128
    dense, sparse = (costs.layer(shape, "step", sparse).bytes for sparse in (False, True))
    assert dense - sparse > 3 * shape.N * 2 * 256 * 2  # AdamW reads and writes the whole pool
    ceilings = costs.Ceilings(1e12, {"bfloat16": 1e15})
    assert ceilings.seconds(costs.Cost(1e12, 1e14), "bfloat16") == 1.0
    assert ceilings.seconds(costs.Cost(1e10, 1e15), "bfloat16") == 1.0
