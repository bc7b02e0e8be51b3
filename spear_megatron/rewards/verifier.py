"""math-verify in worker processes, with a deadline per comparison: sympy may hang on what a model writes."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_WORKER = Path(__file__).with_name("verifier_worker.py")
_START_S = 120.0


class MathVerifier:
    """Compares answers symbolically. Processes start when first needed and are replaced when they hang or die."""

    def __init__(self, *, num_workers: int, deadline_s: float) -> None:
        if num_workers < 1:
            raise ValueError(f"reward.kwargs.num_workers must be at least 1, got {num_workers}")
        if not deadline_s > 0:
            raise ValueError(f"reward.kwargs.deadline_s must be positive, got {deadline_s}")
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self.num_restarts = 0

    async def equal(self, answer: str, truth: str) -> bool:
        """Whether the two are mathematically equal; False when that cannot be decided within the deadline.

        Raises:
            RuntimeError: a worker process does not start.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="math-verify")
        return await asyncio.wrap_future(self._threads.submit(self._ask, answer, truth))

    def close(self) -> None:
        """Stop all processes. A later comparison starts new ones."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None
        while not self._idle.empty():
            self._idle.get_nowait().stop()

    def _ask(self, answer: str, truth: str) -> bool:
        worker = _Worker(self._deadline_s) if self._idle.empty() else self._take()
        verdict = worker.equal(answer, truth)
        if verdict is None:
            self.num_restarts += 1
            worker.stop()
            return False
        self._idle.put(worker)
        return verdict

    def _take(self) -> _Worker:
        try:
            return self._idle.get_nowait()
        except queue.Empty:  # another thread was faster
            return _Worker(self._deadline_s)


class _Worker:
    """One process, which speaks lines of JSON. Run as a file: the package and torch are not imported there."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(deadline_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        ready = self._read_line(_START_S)
        if ready != "ready":
            self.stop()
            raise RuntimeError(
                f"the math-verify worker did not start within {_START_S:.0f} s ({ready or 'no message'}): "
                "pip install math-verify==0.9.0"
            )

    def equal(self, answer: str, truth: str) -> bool | None:
        """The verdict, or None when the process hung or died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([answer, truth]).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return {"equal": True, "different": False}.get(self._read_line(self._deadline_s))

    def stop(self) -> None:
        """Kill the process and reap it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read_line(self, timeout_s: float) -> str:
        """The next line, or '' at the deadline or the end of the stream."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        data = b""
        while not data.endswith(b"\n"):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(descriptor, 4096) if readable else b""
            if not chunk:
                return ""
            data += chunk
        return data.decode(errors="replace").strip()
