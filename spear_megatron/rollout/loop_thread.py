"""An asyncio loop on a thread of its own, so that rollouts go on while the main thread trains."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
CLOSE_S = 30.0
_LOG = logging.getLogger(__name__)


class LoopThread:
    """Runs coroutines on one loop in one daemon thread, started by the first of them. Used from the main thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; its result, or its error, comes through the future.

        Raises:
            RuntimeError: the thread was closed.
        """
        if self._closed:
            coroutine.close()
            raise RuntimeError(f"the thread {self._name} was closed: nothing can be run on it")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._serve, args=(self._loop,), name=self._name, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine to its end.

        Raises:
            TimeoutError: it did not end within ``timeout_s`` seconds; it is told to stop.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():  # its own
                raise
            future.cancel()
            raise TimeoutError(f"nothing came of the thread {self._name} within {timeout_s:g} s") from None

    def close(self) -> None:
        """Cancel what is left, wait for its end and stop the thread. Closing twice is harmless.

        A thread that does not answer, because some code on it blocks, is left to the end of the process.
        """
        self._closed = True
        loop, thread = self._loop, self._thread
        if loop is None or thread is None or not thread.is_alive():
            return
        try:
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(timeout=CLOSE_S)
        except TimeoutError:
            _LOG.warning("the thread %s did not stop within %g s: something on it blocks", self._name, CLOSE_S)
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
