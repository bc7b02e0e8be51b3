"""Workers as a pool: episodes are spread over them, lost ones are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.environments.workers.config import WorkersConfig
from spear_megatron.environments.workers.host import Answer, Method
from spear_megatron.types import Prompt

_LOG = logging.getLogger(__name__)
_PING_S = 10.0


class WorkerLost(RuntimeError):
    """The worker of an episode died or hangs: infrastructure, never the policy's fault."""


class WorkerError(RuntimeError):
    """An environment raised in its worker, or took too long there; the worker lives on."""


class Worker(Protocol):
    """One started worker, used from the event loop that started it."""

    lost: str | None
    """How it was lost; None while it works."""

    async def call(self, episode: int, method: Method, argument: Any) -> Answer:
        """See ``EpisodeHost.call``. Raises WorkerLost."""
        ...

    async def kill(self, reason: str) -> None:
        """End it at once with all of its processes; pending calls raise WorkerLost with ``reason``."""
        ...


StartWorker = Callable[[int], Awaitable[Worker]]
"""Starts the worker of a number; WorkerLost when it does not come up."""


class WorkerPool:
    """Environments in ``config.number`` workers, started when first needed, used from one event loop at a time."""

    def __init__(self, config: WorkersConfig, start: StartWorker) -> None:
        self.num_restarts = 0
        self._config = config
        self._start = start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._workers: list[Worker | None] = [None] * config.number
        self._starting: list[asyncio.Lock] = []
        self._loads = [0] * config.number
        self._numbers = itertools.count()
        self._closed = False

    def environment(self) -> PooledEnvironment:
        """The environment of one episode; it gets its worker at reset."""
        return PooledEnvironment(self, next(self._numbers))

    async def assign(self) -> tuple[int, Worker]:
        """The least loaded worker and its place; counts one more episode there until :meth:`release`.

        Raises:
            WorkerLost: it cannot be started, or ``max_restarts`` are used up.
        """
        if self._closed:
            raise WorkerLost("the environment workers were closed")
        await self._adopt_loop()
        place = min(range(len(self._loads)), key=self._loads.__getitem__)
        self._loads[place] += 1
        try:
            async with self._starting[place]:
                return place, await self._working(place)
        except BaseException:
            self._loads[place] -= 1
            raise

    def release(self, place: int) -> None:
        """One episode less at a place."""
        self._loads[place] -= 1

    async def _working(self, place: int) -> Worker:
        worker = self._workers[place]
        if worker is not None and worker.lost is None:
            return worker
        if worker is not None:
            if self.num_restarts >= self._config.max_restarts:
                raise WorkerLost(
                    f"{self.num_restarts + 1} environment workers were lost, more than env.workers.max_restarts="
                    f"{self._config.max_restarts} allows; the last: {worker.lost}"
                )
            self.num_restarts += 1
            _LOG.warning("environment worker %d is replaced: %s", place, worker.lost)
        self._workers[place] = started = await self._start(place)
        return started

    async def _adopt_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._starting = [asyncio.Lock() for _ in self._workers]
            self._loads = [0] * len(self._workers)
            await self._kill_all("the event loop changed")
            self._workers = [None] * len(self._workers)

    async def call(self, worker: Worker, episode: int, method: Method, argument: Any) -> Any:
        """The result of a method of an episode's environment.

        Raises:
            WorkerError: it raised, or took longer than ``timeout_s``.
            WorkerLost: its worker died, or answers no more.
        """
        timeout_s = self._config.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                good, result = await worker.call(episode, method, argument)
        except TimeoutError:
            late = f"{method} took longer than env.workers.timeout_s={timeout_s:g} s"
            await self._check(worker, late)
            raise WorkerError(late) from None
        if not good:
            raise WorkerError(result)
        return result

    async def _check(self, worker: Worker, late: str) -> None:
        """Kill a worker that is blocked: all of its episodes wait in vain."""
        try:
            async with asyncio.timeout(_PING_S):
                await worker.call(-1, "ping", None)
        except TimeoutError:
            reason = f"it hangs: {late}, and it did not answer within {_PING_S:g} s"
            await worker.kill(reason)
            raise WorkerLost(reason) from None

    async def close(self) -> None:
        """End every worker."""
        self._closed = True
        await self._kill_all("the environment workers were closed")

    async def _kill_all(self, reason: str) -> None:
        for worker in self._workers:
            if worker is not None and worker.lost is None:
                await worker.kill(reason)


class PooledEnvironment:
    """Implements ``Environment``: a handle of an episode whose state lives in a worker."""

    def __init__(self, pool: WorkerPool, episode: int) -> None:
        self._pool = pool
        self._episode = episode
        self._place: int | None = None
        self._worker: Worker | None = None

    async def reset(self, prompt: Prompt) -> Observation:
        """Begin the episode in the least loaded worker; raises WorkerLost and WorkerError."""
        if self._worker is None:
            self._place, self._worker = await self._pool.assign()
        result: Observation = await self._pool.call(self._worker, self._episode, "reset", prompt)
        return result

    async def step(self, turn: Turn) -> StepResult:
        """One turn in the worker; raises WorkerLost and WorkerError."""
        if self._worker is None:
            raise WorkerError("step before reset")
        result: StepResult = await self._pool.call(self._worker, self._episode, "step", turn)
        return result

    async def close(self) -> None:
        """Free what the worker holds of the episode; nothing to do where the worker is gone."""
        if self._worker is None or self._place is None:
            return
        worker, place, self._worker, self._place = self._worker, self._place, None, None
        self._pool.release(place)
        if worker.lost is None:
            with contextlib.suppress(WorkerLost):
                await self._pool.call(worker, self._episode, "close", None)
