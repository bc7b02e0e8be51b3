"""The k smallest of numbers that lie on several ranks: exact, and the same for every split over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Gather = Callable[[Any], list[Any]]
"""From this data-parallel rank's value to those of all ranks, in rank order; a collective call."""


def alone(own: Any) -> list[Any]:
    """The :data:`Gather` of a single rank."""
    return [own]


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
    own = _first(columns, k + 1)
    sent = [column[own] for column in columns]
    merged = [np.concatenate(parts) for parts in zip(*gather(sent), strict=True)]
    chosen = np.zeros(len(columns[0]), dtype=bool)
    if k == 0 or len(merged[0]) <= k:
        chosen[own] = k > 0
        return chosen
    border = _value_at(merged[0], k)
    below, equal = sent[0] <= border, np.zeros(len(own), dtype=bool)
    if np.count_nonzero(merged[0] <= border) > k:
        below, equal = _before(merged, sent, k)
    chosen[own[below | equal]] = True
    return chosen


def _first(columns: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Positions of the ``k`` (at least 1) smallest items, in any order."""
    if len(columns[0]) <= k:
        return np.arange(len(columns[0]))
    kept = np.flatnonzero(columns[0] <= _value_at(columns[0], k))
    # Sorting by all columns is slow: only ties ask for it.
    return kept if len(kept) == k else kept[_order(columns, kept)[:k]]


def _before(merged: list[np.ndarray], sent: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the items sent come before the ``k``-th of ``merged``, and which is that one."""
    kept = np.flatnonzero(merged[0] <= _value_at(merged[0], k))
    last, following = kept[_order(merged, kept)[k - 1 : k + 1]]
    if all(column[last] == column[following] for column in merged):
        raise ValueError("Two tokens have the same key and values: give every row keys of its own.")
    below, equal = np.zeros(len(sent[0]), dtype=bool), np.ones(len(sent[0]), dtype=bool)
    for mine, column in zip(sent, merged, strict=True):
        below |= equal & (mine < column[last])
        equal &= mine == column[last]
    return below, equal


def _value_at(column: np.ndarray, k: int) -> np.generic:
    """The ``k``-th smallest value."""
    value: np.generic = np.partition(column, k - 1)[k - 1]
    return value


def _order(columns: Sequence[np.ndarray], kept: np.ndarray) -> np.ndarray:
    return np.lexsort([column[kept] for column in reversed(columns)])
