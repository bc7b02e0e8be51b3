"""What describes one metric of the record."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """One metric, or a family of them: ``<x>`` in the name stands for a word, ``<k>`` for a number."""

    name: str
    meaning: str
    unit: str


def spread(name: str, meaning: str, unit: str) -> tuple[Metric, ...]:
    """Mean, smallest and largest of one quantity."""
    return tuple(Metric(f"{name}/{statistic}", f"{meaning}, {statistic}", unit) for statistic in ("mean", "min", "max"))
