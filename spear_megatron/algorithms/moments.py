"""Mean and spread of a few numbers, the same in every order."""

from __future__ import annotations

import math
from collections.abc import Sequence


def deviations(values: Sequence[float]) -> tuple[list[float], float]:
    """Differences from the mean, in order, and the sample standard deviation (n - 1 in the denominator).

    Sums are exactly rounded, so the order of ``values`` does not matter. Equal values give exact zeros: a rounding
    error of the mean must not look like an advantage or a spread. So do fewer than two values.
    """
    if not values or min(values) == max(values):
        return [0.0] * len(values), 0.0
    mean = math.fsum(values) / len(values)
    centred = [value - mean for value in values]
    return centred, math.sqrt(math.fsum(value * value for value in centred) / (len(values) - 1))
