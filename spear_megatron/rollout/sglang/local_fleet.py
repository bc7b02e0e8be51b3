"""From settings to the launches of one rank's servers: command, port, log and GPUs of every attempt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.command import ServerSpec, server_command, server_environment
from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.ports import Ports, is_free
from spear_megatron.rollout.sglang.process import Launch, LocalServer, ServerHandle, address_of


class LocalLaunch:
    """Starts the attempts of one server on this machine.

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

    def __call__(self, attempt: int, address: str | None) -> ServerHandle:
        """Start one attempt.

        Raises:
            EngineError: ``address`` is taken by another program, or no port is free.
            OSError: the process cannot be started.
        """
        config = self._config
        port = self._ports.choose() if address is None else _port_of(address)
        if address is not None and not is_free(config.host, port):
            raise EngineError(f"{address} is taken by another program since its server ended")
        return LocalServer(
            server_command(config, self._spec, port, self._ports.choose()),
            url=address_of(config.host, port),
            environment=server_environment(config, self._gpus, self._spec),
            log=self._folder / f"attempt_{attempt}.log",
            grace_s=config.stop_timeout_s,
        )


def _port_of(address: str) -> int:
    port = urlsplit(address).port
    assert port is not None
    return port


def log_folder(config: SGLangLaunchConfig, run_dir: Path) -> Path:
    """Folder of the servers' logs."""
    return Path(config.log_folder) if config.log_folder else run_dir / "sglang"


def local_launches(
    config: SGLangLaunchConfig, spec: ServerSpec, run_dir: Path, numbers: Sequence[int], gpus: Sequence[Sequence[int]]
) -> list[Launch]:
    """Launches of the servers ``numbers`` on this machine, each on its ``gpus``."""
    ports = Ports(config.host)
    folder = log_folder(config, run_dir)
    return [LocalLaunch(config, spec, folder, number, ports, own) for number, own in zip(numbers, gpus, strict=True)]
