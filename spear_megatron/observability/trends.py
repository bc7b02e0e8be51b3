"""A run's record as series of numbers: the first and the last steps of a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

Record = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[int, float]]
WINDOW = 5
SOLVED = 0.9


class Window(NamedTuple):
    """Mean of a metric over some steps, and the first and last of them."""

    value: float
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.value:.3g} over steps {self.first}-{self.last}"


def series(record: Record, name: str) -> list[tuple[int, float]]:
    """(step, value) of metric ``name`` at the training steps that have it as a finite number."""
    return [(line["step"], float(line[name])) for line in record if line["step"] > 0 and line.get(name) is not None]


def head(record: Record, name: str) -> Window | None:
    """The first steps of a metric; None unless it has at least two full windows."""
    points = series(record, name)
    return window(points[:WINDOW]) if len(points) >= 2 * WINDOW else None


def tail(record: Record, name: str) -> Window | None:
    """The last steps of a metric; None unless it has at least one full window."""
    points = series(record, name)
    return window(points[-WINDOW:]) if len(points) >= WINDOW else None


def window(points: Points) -> Window:
    """Mean of ``points`` (not empty) and the steps that they span."""
    return Window(mean(value for _, value in points), points[0][0], points[-1][0])


def is_solved(record: Record) -> bool:
    """Whether the last steps solve nearly every task: then low entropy and equal rewards are no fault."""
    success = tail(record, "success/mean")
    return success is not None and success.value >= SOLVED
