"""From settings to the launches of one rank's servers: command, port, log and GPUs of every attempt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spear_megatron.rollout.sglang.command import ServerSpec, server_command, server_environment
from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.process import Launch, LocalServer, Ports, ServerHandle, address_of


class LocalLaunch:
    """Starts the attempts of one server on this machine, at the same port where it is still free.

    Args:
        number: of the server within the run; names the log folder ``server_<number>``.
        gpus: devices of the server, as this process counts them.
        ports: of ``config.host``, shared by all servers of this machine.
    """

    def __init__(
        self,
        config: SGLangLaunchConfig,
        spec: ServerSpec,
        folder: Path,
        number: int,
        ports: Ports,
        gpus: Sequence[int] = (),
    ) -> None:
        self._config = config
        self._spec = spec
        self._folder = folder / f"server_{number}"
        self._gpus = tuple(gpus)
        self._ports = ports
        self._port: int | None = None

    def __call__(self, attempt: int) -> ServerHandle:
        """Start one attempt; see :class:`LocalServer` and :meth:`Ports.choose` for what it raises."""
        config = self._config
        self._port = self._ports.choose(self._port)
        return LocalServer(
            server_command(config, self._spec, self._port),
            url=address_of(config.host, self._port),
            environment=server_environment(config, self._gpus, self._spec),
            log=self._folder / f"attempt_{attempt}.log",
            grace_s=config.stop_timeout_s,
        )


def local_launches(
    config: SGLangLaunchConfig, spec: ServerSpec, run_dir: Path, numbers: Sequence[int], gpus: Sequence[Sequence[int]]
) -> list[Launch]:
    """Launches of the servers ``numbers`` on this machine, each on its ``gpus``."""
    ports = Ports(config.host)
    folder = Path(config.log_folder) if config.log_folder else run_dir / "sglang"
    return [LocalLaunch(config, spec, folder, number, ports, own) for number, own in zip(numbers, gpus, strict=True)]
