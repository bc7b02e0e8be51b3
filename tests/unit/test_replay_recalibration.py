"""The baseline's moments and median against direct statistics and numpy."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.recalibration import GroupStatistics, percentile, recalibrated_advantage

parts = st.lists(
    st.tuples(
        st.sampled_from([-1.0, -0.5, 0.0, 1.0, 10.0]) | st.floats(-20, 20), st.integers(0, 10).map(lambda n: n / 10)
    ),
    min_size=1,
    max_size=16,
)
coefficients = st.floats(0, 2)


def direct(members: list[tuple[float, float]], mu: float) -> tuple[float, float]:
    """Mean and sample deviation of the shaped rewards themselves."""
    rewards = [base + mu * bonus for base, bonus in members]
    return statistics.fmean(rewards), statistics.stdev(rewards) if len(rewards) > 1 else 0.0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-12, abs=1e-12)
    assert percentile(values[::-1], q) == percentile(values, q)


@pytest.mark.parametrize("values,p50", [([3.0], 3.0), ([1.0, 2.0], 1.5), ([5.0, 1.0, 3.0], 3.0), ([1, 2, 3, 10], 2.5)])
def test_median_by_hand(values: list[float], p50: float) -> None:
    assert percentile(values, 50) == p50


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)


@settings(max_examples=300, deadline=None)
@given(parts, coefficients, coefficients)
def test_moments_give_mean_and_deviation_at_any_coefficient(
    members: list[tuple[float, float]], pushed_at: float, today: float
) -> None:
    bases, bonuses = [base for base, _ in members], [bonus for _, bonus in members]
    group = GroupStatistics.of(bases, bonuses, pushed_at)
    for mu, asked in ((today, today), (pushed_at, pushed_at), (pushed_at, None)):
        mean, std = direct(members, mu)
        assert group.mean(asked) == pytest.approx(mean, rel=1e-9, abs=1e-9)
        # Where the two parts cancel, a deviation is a root of a rounding error of the squares.
        assert group.std(asked) == pytest.approx(std, rel=1e-6, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(parts, coefficients, st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(members: list[tuple[float, float]], mu: float, draw: object) -> None:
    straight = GroupStatistics.of(*zip(*members, strict=True), mu)
    draw.shuffle(members)  # type: ignore[attr-defined]
    assert GroupStatistics.of(*zip(*members, strict=True), mu) == straight


def test_equal_rewards_have_no_spread_and_parts_that_cancel_no_imaginary_one() -> None:
    same = GroupStatistics.of([0.1] * 3, [0.3] * 3, 0.7)
    assert (same.base_var, same.bonus_var, same.covariance, same.stored_std, same.std(0.4)) == (0, 0, 0, 0, 0)
    cancelling = GroupStatistics.of([0.3, 0.2, 0.1], [0.1, 0.2, 0.3], 1.0)
    assert cancelling.std(1.0) == pytest.approx(0.0, abs=1e-7)


def test_one_member_is_its_own_mean() -> None:
    group = GroupStatistics.of([2.0], [0.5], 1.0)
    assert (group.mean(0.0), group.mean(1.0), group.mean(None), group.std(1.0), group.std(None)) == (2, 2.5, 2.5, 0, 0)


def test_parts_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError):
        GroupStatistics.of([1.0, 2.0], [0.0], 1.0)


def test_recalibrated_advantages_by_hand() -> None:
    assert recalibrated_advantage(1.0, 0.25, None) == 0.75
    assert recalibrated_advantage(1.0, 0.25, 0.5) == pytest.approx(0.75 / 0.500001, rel=1e-12)
    assert recalibrated_advantage(-1.0, 0.0, 0.0) == -1.0  # half of the groups are flat: nothing divides
    assert math.copysign(1.0, recalibrated_advantage(0.0, 0.5, 0.5)) == -1.0
