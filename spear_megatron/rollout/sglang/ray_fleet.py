"""Servers below Ray actors, one each, on any machine of the cluster: the death of the actor ends its server."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spear_megatron.parallel.ray_cluster import actor_environment, connected_ray
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.command import ServerSpec
from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.local_fleet import LocalLaunch, log_folder
from spear_megatron.rollout.sglang.ports import Ports
from spear_megatron.rollout.sglang.process import Launch, ServerHandle

_ASK_S = 30.0
_PLACE_S = 120.0


class ServerActor:
    """Runs one guarded server on its machine; the guard ends the server when this process is gone."""

    def __init__(self, config: SGLangLaunchConfig, spec: ServerSpec, folder: str, number: int) -> None:
        gpus = () if spec.on_cpu else tuple(range(config.tp_size))  # Ray shows this process its own GPUs only
        self._launch = LocalLaunch(config, spec, Path(folder), number, Ports(config.host), gpus)
        self._server: ServerHandle | None = None

    def start(self, attempt: int, address: str | None) -> tuple[str, str]:
        """Start the server: its URL, and Ray's id of this machine."""
        ray = connected_ray()
        self._server = self._launch(attempt, address)
        return self._server.url, ray.get_runtime_context().get_node_id()

    def death(self) -> str | None:
        """See ``ServerHandle``."""
        return self._server.death() if self._server is not None else "it was never started"

    def log_tail(self) -> str:
        """See ``ServerHandle``."""
        return self._server.log_tail() if self._server is not None else ""

    def stop(self, grace_s: float) -> None:
        """See ``ServerHandle``."""
        if self._server is not None:
            self._server.stop(grace_s)


class RayServer:
    """Implements ``ServerHandle`` over an actor."""

    def __init__(self, ray: Any, actor: Any, url: str) -> None:
        self._ray = ray
        self._actor = actor
        self._url = url

    @property
    def url(self) -> str:
        """Address of its endpoints."""
        return self._url

    def death(self) -> str | None:
        """See ``ServerHandle``. An actor that does not answer in time passes for alive: health checks decide."""
        try:
            death: str | None = self._ray.get(self._actor.death.remote(), timeout=_ASK_S)
            return death
        except self._ray.exceptions.GetTimeoutError:
            return None
        except self._ray.exceptions.RayError as error:
            return f"the Ray actor of the server at {self._url} is gone: {type(error).__name__}"

    def log_tail(self) -> str:
        """See ``ServerHandle``."""
        try:
            return str(self._ray.get(self._actor.log_tail.remote(), timeout=_ASK_S))
        except self._ray.exceptions.RayError as error:
            return f"(its log cannot be read: {type(error).__name__})"

    def stop(self, grace_s: float) -> None:
        """See ``ServerHandle``."""
        try:
            self._ray.get(self._actor.stop.remote(grace_s), timeout=grace_s + 2 * _ASK_S)
        except self._ray.exceptions.RayError:
            pass  # the guard ends the server of an actor that is gone
        self._ray.kill(self._actor)


class RayLaunch:
    """Starts the attempts of one server in new actors; a server whose address is known stays on its machine."""

    def __init__(self, ray: Any, config: SGLangLaunchConfig, spec: ServerSpec, folder: Path, number: int) -> None:
        self._ray = ray
        self._config = config
        self._spec = spec
        self._folder = folder
        self._number = number
        self._node: str | None = None

    def __call__(self, attempt: int, address: str | None) -> ServerHandle:
        """See :data:`Launch`.

        Raises:
            EngineError: no machine has room for it, or it cannot be started there.
        """
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": 0 if self._spec.on_cpu else self._config.tp_size,
            "scheduling_strategy": "SPREAD",
            "max_concurrency": 4,
            "runtime_env": actor_environment(),
        }
        if address is not None and self._node is not None:
            strategies = self._ray.util.scheduling_strategies
            options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(self._node, soft=False)
        arguments = (self._config, self._spec, str(self._folder), self._number)
        actor = self._ray.remote(ServerActor).options(**options).remote(*arguments)
        try:
            url, self._node = self._ray.get(actor.start.remote(attempt, address), timeout=_PLACE_S)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            late = isinstance(error, self._ray.exceptions.GetTimeoutError)
            why = f"no machine of the Ray cluster took it within {_PLACE_S:g} s" if late else str(error)
            raise EngineError(f"SGLang server {self._number}: {why}") from error
        return RayServer(self._ray, actor, url)


def ray_launches(config: SGLangLaunchConfig, spec: ServerSpec, run_dir: Path, numbers: Sequence[int]) -> list[Launch]:
    """Launches of the servers ``numbers`` in the cluster of RAY_ADDRESS, or in one of this machine.

    Raises:
        ValueError: Ray is not installed; names the command.
    """
    ray = connected_ray()
    absolute = dataclasses.replace(spec, model_path=str(Path(spec.model_path).absolute()))
    folder = log_folder(config, run_dir).absolute()
    return [RayLaunch(ray, config, absolute, folder, number) for number in numbers]
