"""Means over seeds with their intervals, differences paired by seed, and the parabola of an isoFLOP curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of n values and the interval that holds its expectation at the level of 95 %, by Student's t.

    The interval of a single value is infinite.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """How far the interval reaches on either side."""
        return (self.high - self.low) / 2

    @property
    def verdict(self) -> str:
        """Of a difference: "lower", "higher", or "tie" where the interval includes 0; "?" of a single one."""
        if self.n < 2:
            return "?"
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "tie"


def interval(values: Sequence[float]) -> Interval:
    """The mean of values and its interval.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values must hold one number at least, got none")
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    reach = student_quantile(n - 1, (1 + LEVEL) / 2) * error
    return Interval(mean, mean - reach, mean + reach, n)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The mean of ours minus theirs over the seeds that both have, None where there is none.

    Args:
        ours, theirs: seed -> loss, of runs that share text, order of data and seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def student_quantile(freedom: int, probability: float) -> float:
    """The number that Student's t with some degrees of freedom stays below with a probability above 1/2.

    By bisection of the distribution function, which is a finite sum for whole degrees of freedom
    (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Raises:
        ValueError: `freedom` below 1, or a probability not between 1/2 and 1.
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    if not 0.5 < probability < 1:
        raise ValueError(f"probability must be between 0.5 and 1, got {probability}")
    low, high = 0.0, 1.0
    while _within(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The probability that |T| is at most t."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle), math.cos(angle)) if odd else (1.0, 1.0)
    if freedom == 1:
        total = 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@dataclass(frozen=True)
class Parabola:
    """loss = bottom + curvature * (log10(size) - log10(best))^2.

    Attributes:
        best: the size at the minimum.
        bottom: the loss there.
        curvature: above 0.
        range: the smallest and the largest size that were fitted.
    """

    best: float
    bottom: float
    curvature: float
    range: tuple[float, float]

    @property
    def inside(self) -> bool:
        """Whether the minimum lies among the sizes that were fitted; outside it is a guess."""
        return self.range[0] <= self.best <= self.range[1]

    def __call__(self, size: float) -> float:
        return self.bottom + self.curvature * (math.log10(size) - math.log10(self.best)) ** 2


def fit_parabola(sizes: Sequence[float], losses: Sequence[float]) -> Parabola | None:
    """The least-squares parabola of losses over log10 of sizes.

    None where there are fewer than three sizes or the losses do not curve upwards.
    """
    if len(set(sizes)) < 3:
        return None
    x = np.log10(sizes)
    centre = x.mean()
    a, b, c = np.polyfit(x - centre, losses, 2)
    # Of points on a line rounding leaves a curvature, and a minimum far away.
    if a <= 1e-9 * np.abs(losses).max():
        return None
    best = -b / (2 * a) + centre
    return Parabola(float(10**best), float(c - b**2 / (4 * a)), float(a), (min(sizes), max(sizes)))
