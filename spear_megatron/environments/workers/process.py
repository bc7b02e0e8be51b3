"""A worker in a child process, and its end of the connection."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from dataclasses import replace
from typing import Any

from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.environments.workers.host import Answer, Method
from spear_megatron.environments.workers.pool import WorkerLost
from spear_megatron.environments.workers.wire import read_message, write_message

_EXIT_S = 5.0


class ProcessWorker:
    """Implements ``Worker``. Made by :meth:`start`."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.lost: str | None = None
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._reader = reader
        self._writer = writer
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = itertools.count()
        self._receiver: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @classmethod
    async def start(cls, config: EnvironmentConfig, number: int) -> ProcessWorker:
        """A worker that has imported the environment.

        Raises:
            WorkerLost: it did not come up within ``start_timeout_s``, or could not make the environment; says why.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "spear_megatron.environments.workers.serve", str(theirs.fileno()),
                pass_fds=(theirs.fileno(),), env=_environment(), start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = cls(process, reader, writer)
        timeout_s = config.workers.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                write_message(writer, config)
                good, why = await read_message(reader)
        except TimeoutError:
            good, why = False, f"it was not ready within env.workers.start_timeout_s={timeout_s:g} s"
        except (EOFError, ConnectionError):
            good, why = False, f"it died while it started ({await worker._ending()})"
        except BaseException:
            await worker.kill("its start was cancelled")
            raise
        if not good:
            await worker.kill(why)
            raise WorkerLost(f"environment worker {number} cannot start: {why}")
        worker._receiver = asyncio.ensure_future(worker._receive())
        return worker

    async def call(self, episode: int, method: Method, argument: Any) -> Answer:
        """See ``Worker``."""
        if self.lost is not None:
            raise WorkerLost(self.lost)
        number = next(self._numbers)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            write_message(self._writer, (number, episode, method, argument))
            with contextlib.suppress(ConnectionError):  # the receiver tells how it was lost
                await self._writer.drain()
            return await future
        finally:
            self._calls.pop(number, None)

    async def kill(self, reason: str) -> None:
        """See ``Worker``; from another event loop than its own it ends the process and leaves the rest to that loop."""
        if asyncio.get_running_loop() is not self._loop:
            self.lost = self.lost or reason
            self._kill_process()
            return
        self._lose(reason)
        if self._receiver is not None and self._receiver is not asyncio.current_task():
            self._receiver.cancel()
        await self._end_process()

    async def _receive(self) -> None:
        try:
            while True:
                number, good, result = await read_message(self._reader)
                future = self._calls.get(number)
                if future is not None and not future.done():
                    future.set_result((good, result))
        except Exception as error:  # the end of the connection, or an answer that this side cannot read
            gone = isinstance(error, (EOFError, ConnectionError))
            detail = await self._ending() if gone else f"its answer cannot be read: {type(error).__name__}: {error}"
            self._lose(f"an environment worker was lost: {detail}")
            await self._end_process()

    def _lose(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        self._writer.close()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(WorkerLost(reason))

    async def _ending(self) -> str:
        """How the process ended whose connection is closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_S):
                code = await self._process.wait()
                return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return "it closed its connection"

    def _kill_process(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _end_process(self) -> None:
        self._kill_process()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_S):
                await self._process.wait()


def _environment() -> dict[str, str]:
    """The worker finds the modules that this process finds, the user's included."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def share_sandbox(config: EnvironmentConfig) -> EnvironmentConfig:
    """The configuration of one worker: its part of the programs that may run at the same time."""
    programs = -(-config.sandbox.workers // config.workers.number)
    return replace(config, sandbox=replace(config.sandbox, workers=programs))
