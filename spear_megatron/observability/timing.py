"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up wall-clock seconds by phase; ``take`` hands them out as ``timing_s/<phase>`` and starts the next step.

    Used from one thread. Phases may repeat and nest (the inner one's time counts in both). ``synchronize`` runs at the
    borders of every phase, for devices that work asynchronously.
    """

    def __init__(
        self, synchronize: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block under ``name``, also when it raises."""
        self._wait()
        start = self._clock()
        try:
            yield
        finally:
            self._wait()
            self._seconds[name] += self._clock() - start

    def take(self) -> dict[str, float]:
        """``timing_s/<phase>`` of every phase since the last call, and ``timing_s/step``, the whole time since then."""
        self._wait()
        now = self._clock()
        seconds = {f"timing_s/{name}": value for name, value in self._seconds.items()}
        seconds["timing_s/step"] = now - self._start
        self._seconds.clear()
        self._start = now
        return seconds

    def _wait(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
