"""Re-judging a replayed trajectory: its reward against the median of recent group means.

SPEAR (arXiv 2509.22601), section 3.3: A~ = R - P50(D_R), optionally over P50 of the groups' standard deviations. A
reward is linear in the tool-call coefficient, R = base + mu * bonus, so mean and deviation of a group are exact at any
later mu from five moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spear_megatron.algorithms.moments import deviations

_STD_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Moments of one group's rewards R = base + mu * bonus; variances are of a sample (n - 1), 0 for one member.

    Attributes:
        base_mean, bonus_mean, base_var, bonus_var, covariance: of the two parts.
        stored_mean, stored_std: of the rewards as they were shaped when the group was recorded.
    """

    base_mean: float
    bonus_mean: float
    base_var: float
    bonus_var: float
    covariance: float
    stored_mean: float
    stored_std: float

    @classmethod
    def of(cls, base: Sequence[float], bonus: Sequence[float], mu: float) -> GroupStatistics:
        """Moments of at least one member's parts, whose rewards are shaped with ``mu`` now."""
        rewards = [part + mu * extra for part, extra in zip(base, bonus, strict=True)]
        base_centred, base_std = deviations(base)
        bonus_centred, bonus_std = deviations(bonus)
        products = math.fsum(a * b for a, b in zip(base_centred, bonus_centred, strict=True))
        return cls(
            base_mean=math.fsum(base) / len(base),
            bonus_mean=math.fsum(bonus) / len(bonus),
            base_var=base_std**2,
            bonus_var=bonus_std**2,
            covariance=products / (len(base) - 1) if len(base) > 1 else 0.0,
            stored_mean=math.fsum(rewards) / len(rewards),
            stored_std=deviations(rewards)[1],
        )

    def mean(self, mu: float | None) -> float:
        """Mean reward at ``mu``, or as stored for None."""
        return self.stored_mean if mu is None else self.base_mean + mu * self.bonus_mean

    def std(self, mu: float | None) -> float:
        """Standard deviation of the reward at ``mu``, or as stored for None."""
        if mu is None:
            return self.stored_std
        return math.sqrt(max(self.base_var + 2 * mu * self.covariance + mu**2 * self.bonus_var, 0.0))


def percentile(values: Sequence[float], q: float) -> float:
    """Percentile ``q`` (0 to 100) by linear interpolation between order statistics.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100.0
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def recalibrated_advantage(reward: float, p50: float, p50_std: float | None) -> float:
    """A~ of a reward against the baseline; ``p50_std`` divides (``norm_adv_by_std_in_grpo``) unless it is None.

    Where half of the groups have equal rewards the median deviation is 0 and says nothing of the scale: then nothing
    divides, instead of the 1e-6 that would make one replayed success outweigh everything else.
    """
    return (reward - p50) / (p50_std + _STD_EPSILON) if p50_std else reward - p50
