"""The k smallest of numbers that lie on several ranks: exact, and the same for every split over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Gather = Callable[[Any], list[Any]]
"""From this data-parallel rank's value to those of all ranks, in rank order; a collective call."""


def smallest_across(columns: Sequence[np.ndarray], k: int, gather: Gather) -> np.ndarray:
    """Which of this rank's items are among the ``k`` smallest of all ranks.

    Items compare by the first column, then by the next. Every rank sends k + 1 items at most.

    Args:
        columns: arrays [m] without NaN, of the same dtypes on all ranks; the first decides, the others break ties.
        k: at least 0, the same on all ranks.

    Returns:
        bool [m]; min(k, number of items) are True over all ranks.

    Raises:
        ValueError: two items equal in every column stand at the border, so that nothing can decide between them.
    """
    own = _smallest(columns, k + 1)
    sent = [column[own] for column in columns]
    merged = [np.concatenate(parts) for parts in zip(*gather(sent), strict=True)]
    order = _smallest(merged, k + 1)
    chosen = np.zeros(len(columns[0]), dtype=bool)
    if k == 0 or len(order) == 0:
        return chosen
    last = order[min(k, len(order)) - 1]
    if len(order) > k and all(column[last] == column[order[k]] for column in merged):
        raise ValueError("Two tokens have the same key and values: give every row keys of its own.")
    below, equal = np.zeros(len(own), dtype=bool), np.ones(len(own), dtype=bool)
    for mine, column in zip(sent, merged, strict=True):
        below |= equal & (mine < column[last])
        equal &= mine == column[last]
    chosen[own[below | equal]] = True
    return chosen


def _smallest(columns: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Positions of the ``k`` (at least 1) smallest items, ascending."""
    kept = np.arange(len(columns[0]))
    if k < len(kept):
        # Sorting by all columns is slow: only what can still be among the k is.
        kept = np.flatnonzero(columns[0] <= np.partition(columns[0], k - 1)[k - 1])
    return kept[np.lexsort([column[kept] for column in reversed(columns)])[:k]]
