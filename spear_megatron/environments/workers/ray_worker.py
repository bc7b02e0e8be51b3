"""A worker as a Ray actor: the death of the actor is the loss of the worker."""

from __future__ import annotations

import asyncio
from typing import Any

from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.environments.workers.host import Answer, EpisodeHost, Method
from spear_megatron.environments.workers.pool import WorkerLost
from spear_megatron.parallel.ray_cluster import actor_environment, connected_ray

_MAX_CONCURRENCY = 10_000  # episodes wait in their environments, not in Ray's queue


class HostActor:
    """What runs in the actor."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._host = EpisodeHost(config)

    async def call(self, episode: int, method: Method, argument: Any) -> Answer:
        """See ``EpisodeHost.call``."""
        return await self._host.call(episode, method, argument)


class RayWorker:
    """Implements ``Worker``. Made by :meth:`start`."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.lost: str | None = None
        self._ray = ray
        self._actor = actor
        self._pending: set[asyncio.Future[Answer]] = set()

    @classmethod
    async def start(cls, config: EnvironmentConfig, number: int) -> RayWorker:
        """An actor that has imported the environment, on some machine of the cluster.

        Raises:
            WorkerLost: it did not come up within ``start_timeout_s``, or could not make the environment; says why.
        """
        ray = connected_ray()
        options = {
            "num_cpus": 0,  # environments mostly wait; their number is env.workers.number
            "max_concurrency": _MAX_CONCURRENCY,
            "scheduling_strategy": "SPREAD",
            "runtime_env": actor_environment(),
        }
        worker = cls(ray, ray.remote(HostActor).options(**options).remote(config))
        timeout_s = config.workers.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await worker.call(-1, "ping", None)
        except TimeoutError:
            why = f"it was not ready within env.workers.start_timeout_s={timeout_s:g} s"
        except WorkerLost as lost:
            why = str(lost)
        except BaseException:
            await worker.kill("its start was cancelled")
            raise
        else:
            return worker
        await worker.kill(why)
        raise WorkerLost(f"environment worker {number} cannot start: {why}")

    async def call(self, episode: int, method: Method, argument: Any) -> Answer:
        """See ``Worker``."""
        if self.lost is not None:
            raise WorkerLost(self.lost)
        answer = asyncio.wrap_future(self._actor.call.remote(episode, method, argument).future())
        self._pending.add(answer)
        try:
            result: Answer = await answer
            return result
        except self._ray.exceptions.RayError as error:
            self.lost = self.lost or f"an environment worker was lost: {type(error).__name__}: {_first_line(error)}"
            raise WorkerLost(self.lost) from error
        finally:
            self._pending.discard(answer)

    async def kill(self, reason: str) -> None:
        """See ``Worker``."""
        self.lost = self.lost or reason
        self._ray.kill(self._actor)
        for answer in list(self._pending):
            if not answer.done():
                answer.set_exception(WorkerLost(self.lost))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
