"""t intervals: published critical values, coverage, pairing."""

from __future__ import annotations

import math
from random import Random

import pytest
from spear_megatron.evaluation.student import Interval, mean_interval, paired_interval, t_central, t_critical

# Two-sided critical values as printed in textbooks.
TABLE = {
    (1, 0.95): 12.706, (2, 0.95): 4.303, (3, 0.95): 3.182, (4, 0.95): 2.776, (5, 0.95): 2.571, (9, 0.95): 2.262,
    (30, 0.95): 2.042, (1, 0.99): 63.657, (2, 0.99): 9.925, (4, 0.99): 4.604, (10, 0.99): 3.169, (4, 0.9): 2.132,
}  # fmt: skip


@pytest.mark.parametrize(("case", "value"), TABLE.items())
def test_critical_values_of_the_tables(case: tuple[int, float], value: float) -> None:
    assert t_critical(*case) == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 12])
def test_probability_equals_the_integral_of_the_density(df: int) -> None:
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    for t in (0.3, 1.0, 2.5):
        steps = 20_000
        xs = [(index + 0.5) * t / steps for index in range(steps)]
        integral = 2 * sum(scale * (1 + x * x / df) ** (-(df + 1) / 2) for x in xs) * t / steps
        assert t_central(t, df) == pytest.approx(integral, abs=1e-7)


def test_intervals_of_five_seeds_cover_the_truth_as_often_as_they_say() -> None:
    rng = Random(0)
    hits = 0
    for _ in range(2000):
        interval = mean_interval([rng.gauss(0.4, 0.1) for _ in range(5)])
        hits += interval.low <= 0.4 <= interval.high
    assert abs(hits / 2000 - 0.95) < 0.015


def test_mean_and_interval_by_hand() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert interval == pytest.approx((2.0, 2.0 - half, 2.0 + half, 3), abs=1e-4)
    single = mean_interval([0.5])
    assert single.mean == 0.5 and math.isnan(single.low) and single.num == 1 and single.sign == 0
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_signs() -> None:
    assert [Interval(0.2, low, 0.3, 5).sign for low in (0.1, 0.0, -0.1)] == [1, 0, 0]
    assert Interval(-0.2, -0.3, -0.1, 5).sign == -1


def test_pairs_are_matched_by_seed() -> None:
    values, baseline = {1: 0.5, 2: 0.7, 4: 0.9}, {2: 0.4, 1: 0.2, 3: 0.0}
    interval = paired_interval(values, baseline)
    assert interval is not None and interval.mean == pytest.approx(0.3) and interval.num == 2
    assert interval.low == pytest.approx(0.3) == interval.high
    assert paired_interval({1: 0.5}, {2: 0.5}) is None


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="degree of freedom"):
        t_critical(0)
    with pytest.raises(ValueError, match="confidence"):
        t_critical(3, 1.0)
