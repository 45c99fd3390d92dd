"""Ratios between competitors of one run, and the bounds that they should keep."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio of medians (or of peaks) of one case and phase, and its bound.

    Attributes:
        over: names that the ratio is over; the one with the least time counts, for memory too.
        quantity: "time", "memory", or "bandwidth": bytes read per second, where all read the same bytes.
        bound: the ratio is at most this; for "bandwidth", where more is better, at least this.
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
        return self.quantity == "bandwidth"

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
        ratio: None where it could not be formed, for the `reason`.
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
    if not timed:
        name, other = next(iter(others.items()))
        return Outcome(target, None, reason=f"{name}: {other['reason']}", status=other["status"])
    name = min(timed, key=lambda name: timed[name]["median_s"])
    other = timed[name]
    if target.quantity == "memory":
        if ours.get("peak_bytes") is None or not other.get("peak_bytes"):
            reason = "the peak of memory was not measured"
            return Outcome(target, None, over=name, reason=reason, status="skipped")
        ratio = ours["peak_bytes"] / other["peak_bytes"]
        return Outcome(target, ratio, ratio, ratio, name)
    ratio, low, high = (
        ours[a] / other[b] for a, b in (("median_s", "median_s"), ("q1_s", "q3_s"), ("q3_s", "q1_s"))
    )
    if target.at_least:
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    return Outcome(target, ratio, low, high, name)
