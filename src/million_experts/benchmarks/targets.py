"""Ratios between competitors of one run, and the bounds that they should keep."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

# Of a row of results, what holds the bytes of a quantity of memory.
BYTES = {"memory": "peak_bytes", "working memory": "working_bytes", "process memory": "process_bytes"}
# More is better: all read the same bytes, or take the same tokens, so these are inverse ratios of times.
RATES = ("bandwidth", "throughput")


@dataclass(frozen=True)
class Target:
    """A ratio of medians (or of peaks) of one case and phase, and its bound; or a bound on bytes.

    Attributes:
        over: names that the ratio is over; the one with the least time counts, for memory too. None for
            bytes that are bounded themselves.
        quantity: "time"; "time per row", of the expert tables' rows that an iteration touches; "bandwidth",
            bytes read a second, where all read the same bytes; "throughput", tokens a second, where all take
            the same tokens; "memory", the peak above the weights; "working memory", that above weights and
            optimiser state; "process memory", all that the process ever held.
        bound: the ratio, or the bytes, are at most this; a rate, where more is better, at least this.
    """

    name: str
    title: str
    case: str
    phase: str
    ours: str
    over: tuple[str, ...]
    bound: float
    quantity: str = "time"

    @property
    def at_least(self) -> bool:
        return self.quantity in RATES

    @property
    def of_memory(self) -> bool:
        """Whether peaks are needed, which are measured once."""
        return self.quantity in BYTES

    def show(self, value: float) -> str:
        """A ratio or a number of bytes for readers."""
        return f"{value:.3g}" if self.over else f"{value / 1e9:.3g} GB"

    @property
    def bound_text(self) -> str:
        """The bound for readers."""
        return f"{'≥' if self.at_least else '≤'} {self.show(self.bound)}"

    def keeps(self, ratio: float) -> bool:
        """Whether a ratio is within the bound."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound

    def worse_by(self, ratio: float, before: float) -> float:
        """How much worse a ratio is than an earlier one: 0.25 is a quarter, negative is better."""
        return (before / ratio if self.at_least else ratio / before) - 1


@dataclass(frozen=True)
class Outcome:
    """What a target came to.

    Attributes:
        ratio: or bytes, where these are bounded; None where it could not be formed, for the `reason`.
        low, high: the ratio between opposite quartiles; equal to `ratio` for memory, measured once.
        over: the competitor that counted.
        status: that of the row which is to blame where there is no ratio.
    """

    target: Target
    ratio: float | None
    low: float = math.nan
    high: float = math.nan
    over: str = ""
    reason: str = ""
    status: str = "measured"

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.target.keeps(self.ratio)


def evaluate(targets: Iterable[Target], rows: Iterable[Row]) -> list[Outcome]:
    """The outcome of each target from the rows of a run."""
    found = {(row["case"], row["phase"], row["competitor"]): row for row in rows}
    return [_evaluate(target, found) for target in targets]


def _evaluate(target: Target, found: Mapping[tuple[str, str, str], Row]) -> Outcome:
    def row(name: str) -> Row:
        absent = {"status": "absent", "reason": "not measured"}
        return found.get((target.case, target.phase, name), absent)

    ours = row(target.ours)
    others = {name: row(name) for name in target.over}
    timed = {name: other for name, other in others.items() if other["status"] == "measured"}
    if ours["status"] != "measured":
        return Outcome(target, None, reason=f"{target.ours}: {ours['reason']}", status=ours["status"])
    if others and not timed:
        name, other = next(iter(others.items()))
        return Outcome(target, None, reason=f"{name}: {other['reason']}", status=other["status"])
    name = min(timed, key=lambda name: timed[name]["median_s"], default="")
    if target.of_memory:
        return _memory_outcome(target, ours, timed.get(name), name)
    other = timed[name]
    ratio, low, high = (
        ours[a] / other[b] for a, b in (("median_s", "median_s"), ("q1_s", "q3_s"), ("q3_s", "q1_s"))
    )
    if target.quantity == "time per row":
        if not ours.get("touched") or not other.get("touched"):
            reason = "the rows that were touched were not counted"
            return Outcome(target, None, over=name, reason=reason, status="skipped")
        ratio, low, high = (value * other["touched"] / ours["touched"] for value in (ratio, low, high))
    if target.at_least:
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    return Outcome(target, ratio, low, high, name)


def _memory_outcome(target: Target, ours: Row, other: Row | None, name: str) -> Outcome:
    size = ours.get(BYTES[target.quantity])
    divisor = 1 if other is None else other.get(BYTES[target.quantity])
    if size is None or not divisor:
        reason = ours.get("memory_reason") or "the peak of memory was not measured"
        return Outcome(target, None, over=name, reason=reason, status="skipped")
    value = size / divisor
    return Outcome(target, value, value, value, name)
