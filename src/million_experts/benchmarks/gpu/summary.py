"""A run in a page of text, and each row in a line: what is left in a terminal."""

from collections import Counter
from typing import Any

from million_experts.benchmarks.gpu.learns import outcome
from million_experts.benchmarks.gpu.plan import COMPILED, EAGER, OURS, Case
from million_experts.benchmarks.gpu.rows import BAD, latest

Row = dict[str, Any]


def line(row: Row) -> str | None:
    """A row as a line, or None if it says nothing to a reader."""
    status, about = row.get("status"), row.get("about")
    if row.get("part") == "machine":
        memory = row.get("memory_bytes")
        return f"{row['gpu']}, torch {row['torch']}, triton {row['triton']}" + (
            f", {memory / 2**30:.0f} GiB" if memory else ""
        )
    if status is None or (row.get("event") == "end" and "fault" not in row and status == "done"):
        return None
    head = f"{row['part']:6} {row['case'][:58]:58} {(row.get('competitor') or about or '')[:38]:38}"
    if row.get("phase") and row["part"] == "fast" and row["phase"] not in row["case"]:
        head += f" {row['phase']:8}"
    if status == "timed":
        return f"{head} {row['seconds']['median'] * 1e6:11.1f} us {row['over_roofline']:7.2f} x roofline"
    if "valid_loss" in row:
        return f"{head} {row['seconds']:6.1f} s {row['flops']:.1e} FLOPs, loss {row['valid_loss']:.4f}"
    if "fault" in row:
        return f"{head} {status}: {row['fault'][:300]}"
    if row["part"] == "right":
        return f"{head} {status}, error {row['error']:.1e}"
    if about == "times":
        return f"{head} {row['kernel'][:50]:50} {row['microseconds']:9.1f} us"
    return f"{head} {status}"


def targets(rows: list[Row]) -> list[tuple[str, float | None, float]]:
    """What the times should come to: a name, the ratio that was measured, and its bound (at most)."""
    timed = {
        (row["case"], row["competitor"], row["phase"]): row for row in rows if row.get("status") == "timed"
    }
    operations = [
        row["over_roofline"]
        for row in timed.values()
        if row["competitor"] == "PEER" and row["shape"]["T"] >= 8192
    ]

    def best(one: tuple[str, ...], other: str, n: int, T: int, phase: str) -> float | None:
        """The best time of some competitors over another's, in the case where both were timed."""
        for case in dict.fromkeys(row["case"] for row in timed.values()):
            mine = [timed[case, name, phase] for name in one if (case, name, phase) in timed]
            theirs = timed.get((case, other, phase))
            if mine and theirs and (theirs["shape"]["n"], theirs["shape"]["T"]) == (n, T):
                return min(row["seconds"]["median"] for row in mine) / theirs["seconds"]["median"]
        return None

    wide = "dense, 4 * D neurons"
    return [
        ("each operation at T >= 8,192 over its roofline, the worst", max(operations, default=None), 1.5),
        ("training step at 1024^2 over compiled gathers", best(OURS, COMPILED, 1024, 8192, "step"), 1 / 10),
        (
            "training step at 1024^2 over gathers as in PEER-pytorch",
            best(OURS, EAGER, 1024, 8192, "step"),
            1 / 20,
        ),
        ("one token over a dense layer of width 4*D", best(OURS, wide, 1024, 1, "forward"), 2.0),
    ]


def _bad(rows: list[Row]) -> list[str]:
    """What went wrong, each fault once: a terminal keeps so many lines."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] in (*BAD, "out of memory"):
            name = f"{row['part']} {row['case']} {row.get('competitor', '')}".strip()
            found.setdefault((row["status"], row.get("fault", "")[:300]), []).append(name)
    lines = []
    for (status, fault), names in found.items():
        others = f" and {len(names) - 2} more" if len(names) > 2 else ""
        lines.append(f"  {status.upper()}: {'; '.join(names[:2])}{others}{': ' if fault else ''}{fault}")
    return lines


def summarise(all_rows: list[Row], cases: list[Case], missed: list[Case], why: str | None) -> str:
    """The page: counts, what went wrong, targets, what learns, what was not reached."""
    rows = latest(all_rows)
    lines = ["", "Summary" + (f" ({why})" if why else "")]
    for part in dict.fromkeys(case.part for case in cases):
        counts = Counter(row["status"] for row in rows if row["part"] == part)
        planned, left = sum(c.part == part for c in cases), sum(c.part == part for c in missed)
        told = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing"
        lines.append(f"  {part}: {told}; {planned - left} of {planned} cases reached")
    lines += _bad(rows)
    for row in rows:
        if row["case"] == "ceilings" and "products" in row:
            products = ", ".join(f"{dtype} {rate / 1e12:.0f}" for dtype, rate in row["products"].items())
            lines.append(
                f"  ceilings: copy {row['copy'] / 1e12:.2f} TB/s, random rows "
                f"{row['random_rows'] / 1e12:.2f} TB/s; products {products} TFLOP/s"
            )
    for name, ratio, bound in targets(rows):
        if ratio is not None:
            lines.append(
                f"  {'met    ' if ratio <= bound else 'NOT MET'} {name}: {ratio:.3g}, wanted {bound:.3g}"
            )
    worst = sorted((r for r in rows if r["status"] == "timed"), key=lambda r: -r["over_roofline"])
    for row in [r for r in worst if r["competitor"] == "PEER"][:8]:
        lines.append(f"  {row['over_roofline']:6.2f} x roofline: {row['case']}")
    for arm in outcome([row for row in rows if row["part"] == "learns"]):
        flops, seconds = arm["at_equal_flops"], arm["at_equal_time"]
        lines.append(
            f"  {arm['competitor']:8} {arm['tokens_per_second']:.3g} bytes/s, "
            f"loss at {arm['flops']:.2g} FLOPs {'-' if flops is None else format(flops, '.4f')}, "
            f"after {arm['seconds']:.0f} s {'-' if seconds is None else format(seconds, '.4f')}"
        )
    if missed:
        names = "; ".join(f"{c.part} {c.name}" for c in missed[:6])
        lines.append(f"  not reached, `--resume` goes on there: {names}{' ...' if len(missed) > 6 else ''}")
    return "\n".join(lines)


def failed(rows: list[Row]) -> bool:
    """Whether something of ours is wrong."""
    return any(row["status"] in BAD for row in latest(rows))
