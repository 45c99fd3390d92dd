"""Have the ratios become worse than they were?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from million_experts.benchmarks.case import Case
from million_experts.benchmarks.targets import Outcome, Row, Target, evaluate

RETRIES = 2


@dataclass(frozen=True)
class Verdict:
    """A target now and before.

    Attributes:
        failed: it is worse by more than the margin each time that it was measured, or a competitor fails or
            gives a wrong result.
        compared: both ratios are there.
    """

    target: Target
    text: str
    failed: bool = False
    compared: bool = False


def check(
    cases: Sequence[Case],
    committed: Sequence[Row],
    margin: float,
    measure: Callable[[Sequence[Case]], Sequence[Row]],
    retries: int = RETRIES,
) -> list[Verdict]:
    """Measures cases and compares their ratios with those of `committed`.

    The machine may be shared, and another process may slow one competitor down more than another. So what
    seems worse is measured again, up to `retries` times, and the best of its ratios counts: a layer that
    has become slower is slower each time.

    Args:
        margin: how much worse a ratio may be, 0.25 for a quarter.
        measure: gives the rows of cases.
    """
    before = {o.target: o for o in evaluate(_targets(cases), committed)}
    verdicts: dict[Target, Verdict] = {}
    best: dict[Target, Outcome] = {}
    remaining = list(cases)
    for _ in range(1 + retries):
        for outcome in evaluate(_targets(remaining), measure(remaining)):
            target, known = outcome.target, best.get(outcome.target)
            if known is None or known.ratio is None or _better(outcome, known):
                best[target] = outcome
            verdicts[target] = _judge(target, best[target], before[target], margin)
        failed = {verdict.target.case for verdict in verdicts.values() if verdict.failed}
        remaining = [case for case in remaining if case.name in failed]
        if not remaining:
            break
    return list(verdicts.values())


def _targets(cases: Sequence[Case]) -> list[Target]:
    return [target for case in cases for target in case.targets]


def _better(new: Outcome, known: Outcome) -> bool:
    if new.ratio is None or known.ratio is None:
        return False
    return new.target.worse_by(new.ratio, known.ratio) < 0


def _judge(target: Target, now: Outcome, before: Outcome, margin: float) -> Verdict:
    if before.ratio is None:
        return Verdict(target, f"nothing to compare with ({before.reason})")
    if now.ratio is None:
        # A package that is not installed or a machine that is too small is no fault of the code.
        fault = now.status not in ("absent", "skipped")
        return Verdict(
            target, f"was {target.show(before.ratio)}, not measured now: {now.reason}", failed=fault
        )
    worse = target.worse_by(now.ratio, before.ratio)
    change = f"{abs(worse):.0%} {'worse' if worse > 0 else 'better'}"
    text = f"{target.show(now.ratio)}, was {target.show(before.ratio)}: {change}"
    return Verdict(target, text, failed=worse > margin, compared=True)
