"""The pool that a configuration asks for."""

from __future__ import annotations

from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.environments.registry import check_environment_settings
from spear_megatron.environments.workers.pool import Worker, WorkerPool
from spear_megatron.environments.workers.process import ProcessWorker, share_sandbox


def open_workers(config: EnvironmentConfig) -> WorkerPool:
    """A pool of worker processes or Ray actors; none is started before the first episode.

    Raises:
        ValueError: ``env.workers.backend`` is local, the environment cannot be made, or Ray is missing.
    """
    check_environment_settings(config)
    backend = config.workers.backend
    if backend == "local":
        raise ValueError("env.workers.backend=local runs environments in the event loop: there is no pool to open")
    own = share_sandbox(config)
    if backend == "ray":
        from spear_megatron.environments.workers.ray_worker import RayWorker
        from spear_megatron.parallel.ray_cluster import require_ray

        require_ray()

        async def start_actor(number: int) -> Worker:
            return await RayWorker.start(own, number)

        return WorkerPool(config.workers, start_actor)

    async def start_process(number: int) -> Worker:
        return await ProcessWorker.start(own, number)

    return WorkerPool(config.workers, start_process)
