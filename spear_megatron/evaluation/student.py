"""Student's t: intervals of means over a few seeds, without a statistics library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from spear_megatron.observability.intervals import check_confidence


class Interval(NamedTuple):
    """A mean over ``num`` seeds with its confidence interval; ``low`` and ``high`` are NaN for a single seed."""

    mean: float
    low: float
    high: float
    num: int

    @property
    def sign(self) -> int:
        """1 if the whole interval lies above 0, -1 if below, 0 if it holds 0 or is not known."""
        if self.low > 0:
            return 1
        return -1 if self.high < 0 else 0


def t_central(t: float, df: int) -> float:
    """Probability that a t variable of ``df`` degrees of freedom lies within [-t, t].

    Source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, df, 2):  # powers of the cosine up to df - 2
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def t_critical(df: int, confidence: float = 0.95) -> float:
    """Half-width, in standard errors, of the two-sided interval of a mean with ``df`` degrees of freedom.

    Raises:
        ValueError: ``df`` is below 1, or ``confidence`` is not inside (0, 1).
    """
    check_confidence(confidence)
    if df < 1:
        raise ValueError(f"an interval needs at least 1 degree of freedom, got {df}")
    low, high = 0.0, 1.0
    while t_central(high, df) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_central(middle, df) < confidence else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent values and its t interval.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("the mean of no values has no interval")
    num = len(values)
    mean = math.fsum(values) / num
    if num == 1:
        return Interval(mean, math.nan, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (num - 1)
    half = t_critical(num - 1, confidence) * math.sqrt(variance / num)
    return Interval(mean, mean - half, mean + half, num)


def paired_interval(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Interval | None:
    """Mean difference ``values - baseline`` over the seeds that both have, with its t interval; None without any."""
    seeds = sorted(values.keys() & baseline.keys())
    return mean_interval([values[seed] - baseline[seed] for seed in seeds], confidence) if seeds else None
