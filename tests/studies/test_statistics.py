"""Statistics against tables and values worked out by hand."""

from __future__ import annotations

import math

import pytest

from million_experts.studies.statistics import (
    fit_parabola,
    interval,
    paired_difference,
    student_quantile,
)


# The 97.5 % points that every table of Student's t prints.
@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042)],
)
def test_student_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(freedom, 0.975) == pytest.approx(quantile, abs=5e-4)


def test_student_quantiles_of_other_probabilities():
    assert student_quantile(1, 0.75) == pytest.approx(1)  # Cauchy's quartile
    assert student_quantile(2, 0.95) == pytest.approx(2.920, abs=5e-4)
    assert student_quantile(1000, 0.975) == pytest.approx(1.962, abs=5e-4)


def test_what_is_no_degree_of_freedom_or_probability_is_refused():
    with pytest.raises(ValueError, match="freedom must be at least 1, got 0"):
        student_quantile(0, 0.975)
    with pytest.raises(ValueError, match=r"probability must be between 0.5 and 1, got 0.5"):
        student_quantile(3, 0.5)
    with pytest.raises(ValueError, match="values"):
        interval([])


def test_an_interval_by_hand():
    # Mean 2, standard deviation 1, standard error 1/sqrt(3).
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (found.low + found.high) / 2 == pytest.approx(2)
    assert found.n == 3


def test_differences_are_paired_by_seed():
    ours = {0: 3.0, 1: 4.0, 2: 5.0, 7: 100.0}
    theirs = {2: 5.3, 1: 4.2, 0: 3.1, 9: -100.0}
    found = paired_difference(ours, theirs)
    assert found.n == 3
    assert found.mean == pytest.approx(-0.2)
    # The differences are -0.1, -0.2, -0.3: a standard error of 0.1/sqrt(3).
    assert found.high == pytest.approx(-0.2 + 4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert found.verdict == "tie"  # 0.048 above 0
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([-1.0, -1.1, -0.9], "lower"), ([1.0, 1.1, 0.9], "higher"), ([-1.0, 1.0, 0.1], "tie"), ([-1.0], "?")],
)
def test_verdicts(values, verdict):
    assert interval(values).verdict == verdict


def test_a_parabola_is_found_again():
    sizes = [1e6, 2e6, 5e6, 2e7]
    losses = [3 + 0.5 * (math.log10(size) - math.log10(4e6)) ** 2 for size in sizes]
    found = fit_parabola(sizes, losses)
    assert found.best == pytest.approx(4e6)
    assert found.bottom == pytest.approx(3)
    assert found.curvature == pytest.approx(0.5)
    assert found.inside
    assert found(1e7) == pytest.approx(3 + 0.5 * math.log10(2.5) ** 2)


def test_a_minimum_beyond_the_sizes_is_marked():
    sizes = [1e6, 2e6, 3e6]
    losses = [3 + 0.5 * (math.log10(size) - 8) ** 2 for size in sizes]
    found = fit_parabola(sizes, losses)
    assert found.best == pytest.approx(1e8, rel=1e-3)
    assert not found.inside


@pytest.mark.parametrize(
    ("sizes", "losses"),
    [([1e6, 2e6], [3.0, 2.0]), ([1e6, 1e7, 1e8], [3.0, 4.0, 3.0]), ([1e6, 1e7, 1e8], [3.0, 4.0, 5.0])],
)
def test_points_without_a_minimum_have_no_parabola(sizes, losses):
    assert fit_parabola(sizes, losses) is None
