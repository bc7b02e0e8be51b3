"""A sandbox on this machine: bounded concurrency over one fork server, which is replaced when it dies."""

from __future__ import annotations

import asyncio
import json
import site
import tempfile

from spear_megatron.environments.sandbox.config import SandboxConfig
from spear_megatron.environments.sandbox.connection import Connection, ServerError, ServerProcess
from spear_megatron.environments.sandbox.jail.settings import Settings
from spear_megatron.environments.sandbox.protocol import ExecutionResult, infrastructure

_PROBE_S = 20.0


def _package_folders() -> tuple[str, ...]:
    """Where modules are installed; folders on PYTHONPATH are left out, as they hold a user's own files."""
    user = (site.getusersitepackages(),) if site.ENABLE_USER_SITE else ()
    return (*site.getsitepackages(), *user)


def server_settings(config: SandboxConfig, backend: str) -> Settings:
    """The part of ``config`` that the server needs."""
    return Settings(
        backend=backend,
        memory_mb=config.memory_mb,
        cpu_s=config.cpu_s,
        wall_s=config.wall_s,
        output_bytes=config.output_bytes,
        processes=config.processes,
        disk_mb=config.disk_mb,
        preload=config.preload,
        packages=_package_folders(),
        scratch=tempfile.gettempdir(),
    )


def try_backend(backend: str) -> str | None:
    """Start a bare server, which confines one program, and stop it: None if that works, else why not.

    Blocks for about 0.1 s, at most 20 s.
    """
    process = ServerProcess(server_settings(SandboxConfig(preload=()), backend))
    process.control.settimeout(_PROBE_S)
    try:
        process.greeting(process.control.recv(1 << 16))
    except TimeoutError:
        return f"the sandbox server did not start within {_PROBE_S:.0f} s"
    except (OSError, ServerError, json.JSONDecodeError) as error:
        return str(error)
    finally:
        process.kill()
        process.wait()
    return None


class LocalSandbox:
    """Implements ``Sandbox`` with backend ``namespaces`` or ``landlock``.

    The server starts with the first run. All coroutines must be awaited on one event loop at a time; when the loop
    changes between runs the server is started again.
    """

    def __init__(self, config: SandboxConfig, backend: str) -> None:
        self.backend = backend
        self.num_restarts = 0
        self._config = config
        self._settings = server_settings(config, backend)
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turns = asyncio.Semaphore(config.workers)
        self._starting = asyncio.Lock()
        self._closed = False

    async def run(self, code: str) -> ExecutionResult:
        """See ``Sandbox.run``."""
        self._adopt_loop()
        turns = self._turns
        try:
            async with asyncio.timeout(self._config.queue_s):
                await turns.acquire()
        except TimeoutError:
            return infrastructure(f"waited {self._config.queue_s:g} s for one of {self._config.workers} workers")
        try:
            try:
                connection = await self._connected()
            except (ServerError, OSError) as error:
                return infrastructure(str(error))
            return await connection.execute(code)
        finally:
            turns.release()

    def _adopt_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._turns = asyncio.Semaphore(self._config.workers)
            self._starting = asyncio.Lock()

    async def _connected(self) -> Connection:
        async with self._starting:
            if self._closed:
                raise ServerError("the sandbox was closed")
            current = self._connection
            if current is not None and current.failure is None and self._loop is not None:
                if current.belongs_to(self._loop):
                    return current
                await current.close("the event loop changed")
            elif current is not None:
                if self.num_restarts >= self._config.max_restarts:
                    raise ServerError(
                        f"the sandbox server failed {self.num_restarts + 1} times, more often than "
                        f"env.sandbox.max_restarts allows; the last time: {current.failure}"
                    )
                self.num_restarts += 1
                await current.close()
            self._connection = Connection(self._settings)
            try:
                await self._connection.start()
            except asyncio.CancelledError:
                unfinished, self._connection = self._connection, None
                await unfinished.close("its start was cancelled")
                raise
            return self._connection

    async def close(self) -> None:
        """See ``Sandbox.close``."""
        self._closed = True
        if self._connection is not None:
            await self._connection.close()
