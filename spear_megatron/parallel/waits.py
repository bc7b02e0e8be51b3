"""Seconds that this process spent waiting for other ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class WaitClock:
    """Adds up the time of waits, so that what a rank does itself can be told from what it waits for. Main thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._depth = 0
        self.seconds = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block; a wait inside a wait counts once."""
        self._depth += 1
        start = self._clock()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.seconds += self._clock() - start
