"""The figures that SPEAR's released code reports of AIME, computed as it computes them.

They are mean@n, best@k, worst@k and maj@k of verl's validation, the last three as means over 1000 bootstrap draws of k
samples per problem *with* replacement, NumPy's legacy generator at seed 42. So best@k lies below the unbiased pass@k of
:mod:`spear_megatron.evaluation.metrics`, most of all at k = n. In maj@k a sample without an answer votes for "none",
and of tied answers the one wins that was drawn first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from spear_megatron.evaluation.metrics import ProblemSamples

NUM_DRAWS = 1000
SEED = 42


def official_metrics(problems: Sequence[ProblemSamples]) -> dict[str, float]:
    """``official_mean@n`` and ``official_{best,worst,maj}@k`` for k = 2, 4, 8, ... below n, and n; means over problems.

    A figure is the mean over the problems that have it: with lost samples n differs between problems.
    """
    values: dict[str, list[float]] = {}
    for problem in problems:
        count = len(problem.correct)
        values.setdefault(f"official_mean@{count}", []).append(sum(problem.correct) / count)
        for k in official_sizes(count):
            best, worst, majority = _draw(problem, k)
            values.setdefault(f"official_best@{k}", []).append(best)
            values.setdefault(f"official_worst@{k}", []).append(worst)
            values.setdefault(f"official_maj@{k}", []).append(majority)
    return {name: math.fsum(column) / len(column) for name, column in values.items()}


def official_sizes(count: int) -> list[int]:
    """Powers of two from 2 below ``count``, then ``count``; none for a single sample."""
    if count < 2:
        return []
    return [2**power for power in range(1, count.bit_length()) if 2**power < count] + [count]


def _draw(problem: ProblemSamples, k: int) -> tuple[float, float, float]:
    """Means of best, worst and majority over the draws."""
    picks = _picks(len(problem.correct), k)
    drawn = np.asarray(problem.correct, dtype=np.float64)[picks]
    names = list(dict.fromkeys(problem.answers))
    codes = np.asarray([names.index(answer) for answer in problem.answers])[picks]
    same = codes[:, :, None] == codes[:, None, :]
    counts = same.sum(axis=2)
    winner = counts.argmax(axis=1)  # the first of the most frequent: the answer that was drawn first
    majority = drawn[np.arange(len(picks)), winner]
    return float(drawn.max(axis=1).mean()), float(drawn.min(axis=1).mean()), float(majority.mean())


@functools.cache
def _picks(count: int, k: int) -> np.ndarray:
    """Sample indices, int64 [draws, k]: one call of the generator per draw, as there."""
    generator = np.random.RandomState(SEED)
    return np.stack([generator.choice(count, size=k, replace=True) for _ in range(NUM_DRAWS)])
