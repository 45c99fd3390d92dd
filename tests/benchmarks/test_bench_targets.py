"""Ratios, bounds, margins."""

from __future__ import annotations

import math

import pytest

from million_experts.benchmarks.case import Case
from million_experts.benchmarks.check import check
from million_experts.benchmarks.targets import Target, evaluate

TIME = Target("t", "time", "case", "step", "ours", ("slow", "fast"), 2.0)
MEMORY = Target("m", "memory", "case", "step", "ours", ("slow", "fast"), 1.0, "memory")
BANDWIDTH = Target("b", "bandwidth", "case", "step", "ours", ("slow", "fast"), 0.9, "bandwidth")


PER_ROW = Target("r", "time per row", "case", "step", "ours", ("slow", "fast"), 1.5, "time per row")
TOKENS = Target("o", "throughput", "case", "step", "ours", ("slow", "fast"), 0.75, "throughput")
WORKING = Target("w", "working memory", "case", "step", "ours", (), 0.7e9, "working memory")
PROCESS = Target("p", "process memory", "case", "step", "ours", (), 14e9, "process memory")


def row(competitor, median, peak=None, status="measured", reason=""):
    return {
        "case": "case",
        "phase": "step",
        "competitor": competitor,
        "status": status,
        "reason": reason,
        "median_s": median,
        "q1_s": None if median is None else median * 0.9,
        "q3_s": None if median is None else median * 1.2,
        "peak_bytes": peak,
    }


ROWS = [row("ours", 3.0, 50), row("slow", 4.0, 10), row("fast", 2.0, 100)]


def test_ratios_are_over_the_faster_one_for_memory_too():
    time, memory, bandwidth = evaluate([TIME, MEMORY, BANDWIDTH], ROWS)
    assert (time.ratio, time.over, time.met) == (1.5, "fast", True)
    assert time.low == pytest.approx(1.5 * 0.9 / 1.2)
    assert time.high == pytest.approx(1.5 * 1.2 / 0.9)
    assert (memory.ratio, memory.over, memory.met) == (0.5, "fast", True)
    assert bandwidth.ratio == pytest.approx(2 / 3)
    assert bandwidth.low < bandwidth.ratio < bandwidth.high
    assert bandwidth.met is False


def test_time_per_row_divides_by_the_rows_that_each_has_touched():
    counted = [r | {"touched": n} for r, n in zip(ROWS, (300, 10, 100), strict=True)]
    (outcome,) = evaluate([PER_ROW], counted)
    assert (outcome.ratio, outcome.over, outcome.met) == (0.5, "fast", True)
    assert outcome.low == pytest.approx(0.5 * 0.9 / 1.2)
    assert outcome.high == pytest.approx(0.5 * 1.2 / 0.9)
    (outcome,) = evaluate([PER_ROW], ROWS)
    assert (outcome.ratio, outcome.reason) == (None, "the rows that were touched were not counted")


def test_tokens_a_second_are_better_the_more_there_are():
    (outcome,) = evaluate([TOKENS], ROWS)
    assert outcome.ratio == pytest.approx(2 / 3)
    assert (outcome.met, TOKENS.worse_by(0.5, 1.0)) == (False, 1.0)
    assert (TOKENS.bound_text, PER_ROW.bound_text) == ("≥ 0.75", "≤ 1.5")


def test_bytes_are_bounded_themselves():
    ours = row("ours", 3.0, 10**12) | {"working_bytes": 490_000_000, "process_bytes": 15_000_000_000}
    working, process = evaluate([WORKING, PROCESS], [ours])
    assert (working.ratio, working.low, working.high, working.over) == (490e6, 490e6, 490e6, "")
    assert (working.met, process.met, process.ratio) == (True, False, 15e9)
    assert (WORKING.show(490e6), WORKING.bound_text, PROCESS.show(15e9)) == ("0.49 GB", "≤ 0.7 GB", "15 GB")
    assert WORKING.worse_by(0.7e9, 0.35e9) == pytest.approx(1.0)
    (outcome,) = evaluate([WORKING], [row("ours", 3.0, 10**12) | {"memory_reason": "it died"}])
    assert (outcome.ratio, outcome.reason, outcome.status) == (None, "it died", "skipped")
    (outcome,) = evaluate([WORKING], [row("ours", None, status="refused", reason="wrong")])
    assert (outcome.ratio, outcome.status) == (None, "refused")


def test_a_bound_is_kept_up_to_and_including_it():
    assert TIME.keeps(2.0)
    assert not TIME.keeps(2.01)
    assert BANDWIDTH.keeps(0.9)
    assert not BANDWIDTH.keeps(0.89)


def test_what_is_missing_is_said():
    absent = row("fast", None, status="absent", reason="not installed")
    assert evaluate([TIME], [ROWS[0], ROWS[1], absent])[0].over == "slow"
    (outcome,) = evaluate([TIME], [ROWS[0], row("slow", None, status="absent", reason="not installed")])
    assert (outcome.ratio, outcome.met, outcome.reason) == (None, None, "slow: not installed")
    (outcome,) = evaluate([TIME], [row("ours", None, status="refused", reason="wrong"), ROWS[1]])
    assert (outcome.reason, outcome.status) == ("ours: wrong", "refused")
    (outcome,) = evaluate([MEMORY], [row("ours", 1.0), ROWS[1]])
    assert outcome.ratio is None
    assert evaluate([TIME], [])[0].reason == "ours: not measured"


def test_worse_is_up_for_times_and_down_for_bandwidth():
    assert TIME.worse_by(1.5, 1.0) == pytest.approx(0.5)
    assert TIME.worse_by(0.5, 1.0) == pytest.approx(-0.5)
    assert BANDWIDTH.worse_by(0.5, 1.0) == pytest.approx(1.0)
    assert BANDWIDTH.worse_by(1.0, 0.5) == pytest.approx(-0.5)


CASE = Case("case", "a case", (), ("step",), (TIME,))


def judged(*ours, before=1.0, target=TIME, margin=0.25):
    """Verdict when the ratio is `ours[i]` the i-th time, and how often it was measured."""
    case = Case("case", "a case", (), ("step",), (target,))
    times = iter(ours)
    calls = []

    def measure(cases):
        calls.append([case.name for case in cases])
        return [row("ours", next(times)), row("fast", 1.0)]

    (verdict,) = check([case], [row("ours", before), row("fast", 1.0)], margin, measure)
    return verdict, len(calls)


@pytest.mark.parametrize(
    ("ours", "failed", "calls"),
    [
        ((1.24,), False, 1),
        ((0.5,), False, 1),
        ((1.3, 1.2), False, 2),  # another process was to blame
        ((1.3, 1.4, 1.1), False, 3),
        ((1.3, 1.4, 1.29), True, 3),
    ],
)
def test_what_seems_worse_is_measured_again_before_it_fails(ours, failed, calls):
    verdict, measured = judged(*ours)
    assert verdict.compared
    assert (verdict.failed, measured) == (failed, calls)
    assert f"{min(ours):.3g}, was 1: " in verdict.text


def test_the_margin_is_the_callers_and_bandwidth_falls():
    assert judged(1.3, margin=0.5)[1] == 1
    assert not judged(1.2, target=BANDWIDTH)[0].failed
    assert judged(1.3, 1.3, 1.3, target=BANDWIDTH)[0].failed
    assert not judged(0.7, target=BANDWIDTH)[0].failed


def test_bytes_are_checked_against_those_before():
    case = Case("case", "a case", (), ("step",), (WORKING,))
    sizes = iter((700_000_000, 500_000_000))

    def measure(cases):
        return [row("ours", 1.0) | {"working_bytes": next(sizes)}]

    before = [row("ours", 1.0) | {"working_bytes": 490_000_000}]
    (verdict,) = check([case], before, 0.25, measure)
    assert (verdict.failed, verdict.compared) == (False, True)
    assert verdict.text == "0.5 GB, was 0.49 GB: 2% worse"


def test_only_cases_that_fail_are_measured_again():
    other = Target("o", "other", "other", "step", "ours", ("fast",), 2.0)
    cases = [CASE, Case("other", "another", (), ("step",), (other,))]
    calls = []

    def measure(now):
        calls.append([case.name for case in now])
        ratio = {"case": 2.0, "other": 1.0}
        return [
            row(who, ratio[c.name] if who == "ours" else 1.0) | {"case": c.name}
            for c in now
            for who in ("ours", "fast")
        ]

    committed = [row(who, 1.0) | {"case": c.name} for c in cases for who in ("ours", "fast")]
    verdicts = check(cases, committed, 0.25, measure)
    assert calls == [["case", "other"], ["case"], ["case"]]
    assert [v.failed for v in verdicts] == [True, False]


@pytest.mark.parametrize(
    ("status", "failed"), [("absent", False), ("skipped", False), ("refused", True), ("failed", True)]
)
def test_a_missing_package_is_no_fault_but_a_wrong_result_is(status, failed):
    now = [row("ours", None, status=status, reason="why"), row("fast", 1.0)]
    (verdict,) = check([CASE], [row("ours", 1.0), row("fast", 1.0)], 0.25, lambda cases: now)
    assert (verdict.failed, verdict.compared) == (failed, False)
    assert "why" in verdict.text


def test_nothing_to_compare_with_is_said():
    (verdict,) = check([CASE], [], 0.25, lambda cases: [row("ours", 1.0), row("fast", 1.0)])
    assert (verdict.failed, verdict.compared) == (False, False)
    assert "nothing to compare with" in verdict.text
    assert not math.isnan(TIME.bound)
