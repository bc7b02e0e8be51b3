"""Shares of a count without the rounding error of the product: 0.29 of 100 is 29."""

from __future__ import annotations

import math

_DIGITS = 9


def floor_share(ratio: float, count: int) -> int:
    """floor(ratio * count), where the product is meant as the decimal number that the ratio was written as."""
    return math.floor(round(ratio * count, _DIGITS))
