"""Shares of a count without the rounding error of the product: 0.29 of 100 is 29."""

from __future__ import annotations

import math

_DIGITS = 9


def share(ratio: float, count: int) -> float:
    """ratio * count, where the product is meant as the decimal number that the ratio was written as."""
    return round(ratio * count, _DIGITS)


def floor_share(ratio: float, count: int) -> int:
    """The whole part of :func:`share`."""
    return math.floor(share(ratio, count))
