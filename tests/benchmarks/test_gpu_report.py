"""Rows of the GPU check as a page, figures, a summary and the README's table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from million_experts.benchmarks.gpu import plan, report, rivals, rows, summary
from million_experts.benchmarks.gpu.costs import OPERATIONS, PHASES, Shape

ROOT = Path(__file__).parents[2]
CENTRE = Shape(8192, 1024, 256)


def timed(case: str, competitor: str, phase: str, shape: Shape, seconds: float, over: float = 2.0) -> dict:
    times = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds, "repetitions": 25}
    return {
        "part": "fast", "case": case, "competitor": competitor, "phase": phase, "shape": vars(shape),
        "status": "timed", "seconds": times, "bytes": 1e9, "flops": 1e9, "roofline_seconds": seconds / over,
        "over_roofline": over, "peak_bytes": 10**9,
    }  # fmt: skip


def made(rehearsal: bool = False) -> list[dict]:
    """Rows as a run on a GPU leaves them."""
    versions = {"torch": "2.11"}
    machine = {"gpu": "A GPU", "cuda": "13.0", "driver": "580.1", "torch": "2.11", "triton": "3.6"}
    wrong = {"status": "wrong", "error": None, "fault": "y is NaN"}
    found: list[dict] = [
        {"part": "run", "commit": "c" * 40, "source": "abc", "rehearsal": rehearsal, "versions": versions},
        {"part": "machine"} | machine,
        {"part": "right", "case": "experts tiles float32", "status": "right", "error": 1e-7},
        {"part": "right", "case": "experts odd float32"} | wrong,
        {"part": "right", "case": "retrieval T=1", "status": "right", "error": 2e-8},
        {"part": "right", "case": "tf32x3", "status": "right", "error": 0.0, "keeps_float32": True,
         "norms": {"tiles": 1e-7, "by token": 1e-7}},
        {"part": "fast", "case": "ceilings", "status": "done", "copy": 4e12, "random_rows": 2e12,
         "products": {"bfloat16": 7e14, "float32": 5e13}},
    ]  # fmt: skip
    layers = "layer: centre"
    for phase in PHASES:
        for name, seconds in ((rivals.OURS_SPARSE, 1e-3), (rivals.OURS_DENSE, 2e-3), (rivals.GATHERS, 30e-3)):
            found.append(timed(layers, name, phase, CENTRE, seconds))
    found.append({"part": "fast", "case": layers, "competitor": "grouped mixture, 2 of 8", "phase": "all",
                  "shape": vars(CENTRE), "status": "out of memory"})  # fmt: skip
    compiled = "layer, compiled: centre"
    found.append(timed(compiled, rivals.OURS_SPARSE, "step", CENTRE, 1e-3))
    found.append(timed(compiled, rivals.COMPILED, "step", CENTRE, 8e-3))
    for n in (128, 512):
        found.append(timed(f"layer: {n}", rivals.OURS_SPARSE, "step", Shape(8192, n, 256), 1e-3))
    for name in OPERATIONS:
        found.append(timed(f"{name}: centre", "PEER", name, CENTRE, 1e-4, 1.4))
    head = {"part": "why", "case": "furthest, 1", "phase": "experts, forward", "shape": vars(CENTRE),
            "over_roofline": 2.0, "status": "done"}  # fmt: skip
    binary = {
        "warps": 1, "registers": 64, "spills": 0, "shared_bytes": 0, "occupancy": 0.5, "bound_by": "registers"
    }  # fmt: skip
    counters = {"nanoseconds": 5e4, "bytes_read": None}
    found += [
        head | {"about": "operation"},
        head | {"about": "times", "kernel": "dots_kernel", "launches": 1, "microseconds": 50.0},
        head | {"about": "binary", "kernel": "dots_kernel", "key": "k"} | binary,
        head | {"about": "counters", "kernel": "dots_kernel", "launch": 0} | counters,
        {"part": "learns", "case": "arms", "competitor": "plan", "status": "done", "budget_flops": 1e15,
         "tokens_per_second": {"PEER": 1e6}, "parameters": {"PEER": 10**9}},
        {"part": "learns", "case": "arms", "competitor": "PEER", "status": "done", "turn": 1, "flops": 1e14,
         "seconds": 1.0, "valid_loss": 2.0},
        {"part": "learns", "case": "arms", "competitor": "PEER", "status": "done", "turn": 2, "flops": 1e15,
         "seconds": 2.0, "valid_loss": 1.5},
    ]  # fmt: skip
    return [{"run": "first"} | row for row in found]


def write(folder: Path, found: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / rows.FILE).write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """They take seconds, and one test is about them."""
    from million_experts.benchmarks.gpu import figures

    monkeypatch.setattr(figures, "draw", lambda *_: [])


def test_rows_become_a_page_with_figures(tmp_path):
    output = tmp_path / "pages"
    assert report.main([str(write(tmp_path / "run", made())), "--output", str(output)]) == 0
    page = (output / report.PAGE).read_text()
    assert {path.name for path in output.iterdir()} == {
        "results.md", "rows.jsonl", "time-over-n.png", "time-over-t.png", "time-over-d.png", "roofline.png",
        "learns.png",
    }  # fmt: skip
    for text in (
        "first: A GPU, CUDA 13.0, driver 580.1; torch 2.11; commit cccccccccccc, source abc.",
        "| experts | 2 | 1 | 1.0e-07 |",
        "**wrong**: experts odd float32: y is NaN",
        "(`tf32x3`) keep float32's precision",
        "| training step at 1024^2 over compiled gathers | 0.125 | 0.1 | **not met** |",
        "| training step at 1024^2 over gathers as in PEER-pytorch | 0.0333 | 0.05 | met |",
        "| one token over a dense layer of width 4*D | - | 2 | not measured |",
        "| experts, forward | T=8192 N=1024^2 D=256 bfloat16 | 100 us |",
        "| grouped mixture, 2 of 8 | out of memory | out of memory | out of memory | - |",
        "| dots_kernel | 1 | 64 | 0 | 0 | 50% | registers |",
        "| `dots_kernel` | 5e+04 | - |",
        "| PEER | 1,000.0 | 1,000 | 1.5000 | 1.5000 |",
    ):
        assert text in page, text
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (output / name).exists()


def test_a_page_can_be_made_again_of_its_own_rows(tmp_path, no_figures):
    output = write(tmp_path / "pages", made())
    for _ in range(2):
        assert report.main([str(output), "--output", str(output)]) == 0
    assert rows.read(output) == made()


def test_the_readme_s_last_column_is_filled_and_nothing_else(tmp_path, no_figures):
    readme = tmp_path / "README.md"
    before = (ROOT / "README.md").read_text()
    readme.write_text(before)
    arguments = [str(write(tmp_path / "run", made())), "--output", str(tmp_path), "--readme", str(readme)]
    assert report.main(arguments) == 0
    after = readme.read_text()
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert len(changed) == 4
    for old, new in changed:
        assert old.rpartition("| ")[0] == new.rpartition("| ")[0] or "not measured" in old
        assert old.split("|")[:-2] == new.split("|")[:-2]
    told = [new.split("|")[-2].strip() for _, new in changed]
    assert told[0].startswith("1 of 2 cases right; at T=8192 N=1024^2 D=256 bfloat16: forward 100 us, 1.40 x")
    assert told[3] == "in the whole layer's: forward 1 ms, backward 1 ms, step 1 ms"
    assert report.fill(after, {}) == before  # until there are rows


def test_the_readme_has_its_table():
    readme = (ROOT / "README.md").read_text()
    assert report.fill(readme, {}) == readme
    with pytest.raises(ValueError, match="between"):
        report.fill(readme.replace(report.END, ""), {})


def test_a_rehearsal_fills_no_readme(tmp_path, capsys, no_figures):
    folder = write(tmp_path / "run", made(rehearsal=True))
    with pytest.raises(SystemExit):
        report.main([str(folder), "--output", str(tmp_path), "--readme", str(tmp_path / "README.md")])
    assert "rows of a rehearsal measure nothing" in capsys.readouterr().err
    assert report.main([str(folder), "--output", str(tmp_path / "pages")]) == 0
    assert "A rehearsal" in (tmp_path / "pages" / report.PAGE).read_text()


def test_no_rows_no_page(tmp_path, capsys):
    folder = write(tmp_path / "run", made()[:1])
    with pytest.raises(SystemExit):
        report.main([str(folder), "--output", str(tmp_path / "pages")])
    assert "no case has come to an end" in capsys.readouterr().err
    assert not (tmp_path / "pages").exists()


def test_parts_that_were_not_reached_leave_no_hole(tmp_path):
    found = [row for row in made() if row["part"] in ("run", "machine", "right")]
    assert report.main([str(write(tmp_path / "run", found)), "--output", str(tmp_path / "pages")]) == 0
    assert [p.name for p in (tmp_path / "pages").glob("*.png")] == []


def test_the_summary_names_what_is_wrong_and_what_is_left():
    cases = [plan.Case("right", "experts tiles float32", "f"), plan.Case("fast", "left", "f")]
    text = summary.summarise(made(), cases, cases[1:], None)
    for line in (
        "right: 3 right, 1 wrong; 1 of 1 cases reached",
        "WRONG: right experts odd float32: y is NaN",
        "OUT OF MEMORY: fast layer: centre grouped mixture, 2 of 8",
        "ceilings: copy 4.00 TB/s",
        "NOT MET training step at 1024^2 over compiled gathers: 0.125, wanted 0.1",
        "met     each operation at T >= 8,192 over its roofline, the worst: 1.4, wanted 1.5",
        "PEER     1e+06 bytes/s, loss at 1e+15 FLOPs 1.5000, after 2 s 1.5000",
        "not reached, `--resume` goes on there: fast left",
    ):
        assert line in text, line


def test_a_fault_that_many_cases_have_takes_one_line():
    fault = {"part": "right", "status": "failed", "fault": "no ptxas", "run": "first"}
    text = summary.summarise([fault | {"case": f"case {i}"} for i in range(50)], [], [], None)
    assert "FAILED: right case 0; right case 1 and 48 more: no ptxas" in text
    assert len(text.splitlines()) < 10


def test_each_row_is_a_line_or_none():
    for row in made():
        text = summary.line(row)
        assert text is None or "\n" not in text
    lines = [summary.line(row) for row in made()]
    assert "A GPU, torch 2.11, triton 3.6" in lines
    assert any("x roofline" in line for line in lines if line)
    assert summary.line({"part": "right", "case": "a", "event": "begin"}) is None
