"""Work that the ranks of a conversion share, without collectives while they work; one line of progress for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from spear_megatron.checkpoint.errors import CheckpointError
from spear_megatron.parallel.agreement import forget_heartbeat, gather_objects, heartbeat, wait_for_leaders
from spear_megatron.parallel.state import ParallelState

T = TypeVar("T")

TIMEOUT_S = 24 * 3600.0
"""Deadline of one phase of a conversion."""
REPORT_EVERY_S = 5.0
Say = Callable[[str], None]


class Crew:
    """All ranks of one conversion. Rank 0 speaks."""

    def __init__(self, parallel: ParallelState, say: Say) -> None:
        self.parallel = parallel
        self._say = say

    def say(self, text: str) -> None:
        """Tell the user, once for all ranks."""
        if self.parallel.rank == 0:
            self._say(text)

    def together(self, phase: str, body: Callable[[], T]) -> list[T]:
        """Run ``body`` (no collectives in it) on every rank; the results in rank order. Collective.

        Raises:
            ValueError, CheckpointError: on every rank alike, when it failed on any: bad input, or anything else.
            RunTimeout: a rank was not heard of, or took longer than ``TIMEOUT_S``.
        """
        result: T | None = None
        problem: tuple[bool, str] | None = None
        with heartbeat(self.parallel, phase):
            try:
                result = body()
            except (ValueError, OSError, RuntimeError) as error:
                problem = isinstance(error, ValueError), str(error)
                self.parallel.store.set(f"{phase}/failed", "1")
        if self.parallel.world_size > 1:
            wait_for_leaders(self.parallel, phase, list(range(self.parallel.world_size)), TIMEOUT_S)
        answers = gather_objects(self.parallel, (result, problem))
        forget_heartbeat(self.parallel, phase)
        problems = [found for _, found in answers if found is not None]
        if problems:
            is_input, text = problems[0]
            raise ValueError(text) if is_input else CheckpointError(text)
        return [answer for answer, _ in answers]  # type: ignore[misc]

    def on_first(self, phase: str, body: Callable[[], T]) -> T:
        """Run ``body`` on rank 0 alone and give its result to all. Collective; raises as :meth:`together`."""
        answers = self.together(phase, lambda: [body()] if self.parallel.rank == 0 else [])
        return answers[0][0]

    def claims(self, phase: str, count: int) -> Iterator[int]:
        """Numbers below ``count``, each given to one rank, to whoever asks first; ends early when a rank failed."""
        while not self.parallel.store.check([f"{phase}/failed"]):
            number = self.parallel.store.add(f"{phase}/claimed", 1) - 1
            if number >= count:
                return
            yield number

    @contextmanager
    def progress(self, what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Gives a function that counts bytes; rank 0 reports the sum of all ranks every few seconds."""
        key, over, start = f"{what}/bytes", threading.Event(), time.monotonic()
        store = self.parallel.store

        def report() -> None:
            while not over.wait(REPORT_EVERY_S):
                done = store.add(key, 0)
                rate = done / (time.monotonic() - start)
                left = f"{(total_bytes - done) / rate:.0f} s left" if done else "starting"
                self._say(f"{what}: {done / 1e9:.2f} of {total_bytes / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left}")

        def count(num_bytes: int) -> None:
            store.add(key, num_bytes)

        thread = threading.Thread(target=report, name="progress", daemon=True)
        if self.parallel.rank == 0:
            thread.start()
        try:
            yield count
        finally:
            over.set()
            if self.parallel.rank == 0:
                thread.join()

