"""Confidence intervals of proportions."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(rate: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; unlike the bootstrap it stays wide at 0 % and 100 %.

    Source: Wilson (1927), JASA 22. ``trials`` may be fractional (an effective sample size).

    Raises:
        ValueError: ``rate`` is not in [0, 1], ``trials`` is not positive, or ``confidence`` is not inside (0, 1).
    """
    check_confidence(confidence)
    if not 0.0 <= rate <= 1.0 or trials <= 0:
        raise ValueError(f"a proportion needs a rate in [0, 1] and positive trials, got {rate} of {trials}")
    z = NormalDist().inv_cdf((1.0 + confidence) / 2)
    spread = 1.0 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / spread
    half = z * math.sqrt(rate * (1.0 - rate) / trials + z * z / (4 * trials * trials)) / spread
    return (0.0 if rate == 0.0 else max(0.0, centre - half)), (1.0 if rate == 1.0 else min(1.0, centre + half))


def check_confidence(confidence: float) -> None:
    """ValueError unless ``confidence`` is inside (0, 1)."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be inside (0, 1), got {confidence}")
