"""Reads one output stream of a program from a pipe, without threads and never more than the limit into memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_CHUNK_BYTES = 1 << 16


class Capture:
    """Collects up to ``limit`` bytes; ``write_fd`` is the program's end of the pipe."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, on_overflow: Callable[[], None]) -> None:
        self._loop = loop
        self._limit = limit
        self._on_overflow = on_overflow
        self._kept = bytearray()
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._ended: asyncio.Future[None] = loop.create_future()
        self.truncated = False
        loop.add_reader(self._read_fd, self._read)

    def release_write_end(self) -> None:
        """Close our copy of the program's end, so that the end of the program is the end of the stream."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def _read(self) -> None:
        try:
            chunk = os.read(self._read_fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        room = self._limit - len(self._kept)
        self._kept += chunk[:room]
        if len(chunk) > room and not self.truncated:
            self.truncated = True
            self._on_overflow()
        if not chunk:
            self._loop.remove_reader(self._read_fd)
            if not self._ended.done():
                self._ended.set_result(None)

    async def text(self, deadline_s: float) -> str:
        """Everything kept, as text, when all writers have closed the stream or after ``deadline_s`` seconds."""
        await asyncio.wait([self._ended], timeout=deadline_s)
        return self._kept.decode("utf-8", errors="replace")

    def close(self) -> None:
        """Stop reading and close both ends."""
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)
        self.release_write_end()
