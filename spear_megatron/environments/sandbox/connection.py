"""One local sandbox server: its process, its control socket, and the runs that it holds."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from spear_megatron.environments.sandbox.capture import Capture
from spear_megatron.environments.sandbox.jail.settings import EXIT_MEMORY, Settings
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus, infrastructure

_BOOTSTRAP = "import sys; sys.path.insert(0, sys.argv.pop(1)); from jail.server import main; main()"
_MAX_MESSAGE_BYTES = 1 << 16
_START_S = 60.0
_REPORT_GRACE_S = 30.0  # a loaded machine may keep the server from running for seconds
_EXIT_S = 5.0
_DRAIN_S = 2.0
# One thread for each numeric library: no idle pools that a fork would lose, and sums in one order.
_SERVER_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "TZ": "UTC0",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}


class ServerError(Exception):
    """The server could not be started or does not answer."""


class ServerProcess:
    """The operating system's side: process, control socket, and what the server wrote on stderr."""

    def __init__(self, settings: Settings) -> None:
        environment = dict(_SERVER_ENVIRONMENT)
        if "LD_LIBRARY_PATH" in os.environ:  # where this interpreter finds its own libraries
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self._scratch = ""
        arguments = [str(Path(__file__).parent), settings.to_json(), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", "-c", _BOOTSTRAP, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                env=environment,
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def greeting(self, data: bytes) -> dict[str, Any]:
        """Parse the first message.

        Raises:
            ServerError: the server could not isolate programs here, or died.
        """
        message = json.loads(data) if data else {"failed": f"the server died while it started: {self.log_tail()}"}
        if "failed" in message:
            raise ServerError(message["failed"])
        self._scratch = message["scratch"]
        return dict(message)

    def log_tail(self) -> str:
        """Last 1000 bytes that the server wrote on stderr."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 1000))
        return self._log.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """SIGKILL the server; the kernel ends all programs with it. The process is collected by ``collect``."""
        self.control.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Block until the killed process is gone, at most 5 s."""
        self._process.wait(_EXIT_S)
        self._clean_up()

    def collected(self) -> bool:
        """Whether the killed process has ended; what it left on disk is then deleted."""
        if self._process.poll() is None:
            return False
        self._clean_up()
        return True

    def _clean_up(self) -> None:
        self._log.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


class Connection:
    """The asyncio side of one server, bound to the running event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._process = ServerProcess(settings)
        self._process.control.setblocking(False)
        self._next_id = 1
        self._runs: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.failure: str | None = None
        self.preloaded: tuple[str, ...] = ()

    async def start(self) -> None:
        """Wait until the server has preloaded its modules and confined a first program.

        Raises:
            ServerError: it failed or took longer than a minute.
        """
        control = self._process.control
        try:
            async with asyncio.timeout(_START_S):
                data = await self._loop.sock_recv(control, _MAX_MESSAGE_BYTES)
            message = self._process.greeting(data)
        except (OSError, TimeoutError, ServerError) as error:
            await self.close(str(error) or "the server did not start")
            raise ServerError(str(error) or f"the sandbox server did not start within {_START_S:.0f} s") from error
        self.preloaded = tuple(message["ready"])
        self._loop.add_reader(control, self._receive)

    def belongs_to(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether this connection can be used from ``loop``."""
        return self._loop is loop

    def _receive(self) -> None:
        try:
            data = self._process.control.recv(_MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(f"the sandbox server is gone: {error}")
            return
        if not data:
            self._fail(f"the sandbox server died: {self._process.log_tail()}")
            return
        message = json.loads(data)
        future = self._runs.pop(message["id"], None)
        if future is not None and not future.done():
            future.set_result(message)

    def _fail(self, reason: str) -> None:
        """Declare the server dead and end every run that waits on it."""
        if self.failure is not None:
            return
        self.failure = reason
        if not self._loop.is_closed():
            self._loop.remove_reader(self._process.control)
        self._process.kill()
        waiting, self._runs = list(self._runs.values()), {}
        for future in waiting:
            if not future.done():
                future.set_result({"reason": "setup", "detail": reason, "exit": 0, "wall_s": 0.0})

    async def close(self, reason: str = "the sandbox was closed") -> None:
        """Kill the server with all programs and wait, at most 5 s, until it is gone."""
        self._fail(reason)
        deadline = time.monotonic() + _EXIT_S
        while not self._process.collected() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    async def execute(self, code: str) -> ExecutionResult:
        """Run one program; see ``Sandbox.run``. A server that misses its own deadline is declared dead."""
        run_id, self._next_id = self._next_id, self._next_id + 1
        limit = self._settings.output_bytes
        captures: list[Capture] = []
        try:
            for _ in range(2):
                captures.append(Capture(self._loop, limit, lambda: self._send_kill(run_id, "output")))
            outcome = await self._outcome(run_id, code, captures)
            stdout, stderr = [await capture.text(_DRAIN_S) for capture in captures]
        except OSError as error:
            return infrastructure(f"could not hand the program to the sandbox server: {error}")
        finally:
            self._runs.pop(run_id, None)
            for capture in captures:
                capture.close()
        status, detail = _classify(outcome, any(capture.truncated for capture in captures), self._settings)
        return ExecutionResult(
            status=status,
            stdout=stdout,
            stderr=stderr,
            duration_s=outcome["wall_s"],
            stdout_truncated=captures[0].truncated,
            stderr_truncated=captures[1].truncated,
            detail=detail,
        )

    async def _outcome(self, run_id: int, code: str, captures: list[Capture]) -> dict[str, Any]:
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._runs[run_id] = future
        source = os.memfd_create("program", os.MFD_CLOEXEC)
        try:
            with open(source, "wb", closefd=False) as file:
                file.write(code.encode("utf-8", "surrogatepass"))
            os.lseek(source, 0, os.SEEK_SET)
            message = json.dumps({"run": run_id}).encode()
            socket.send_fds(self._process.control, [message], [source, *(capture.write_fd for capture in captures)])
        finally:
            os.close(source)
            for capture in captures:
                capture.release_write_end()
        limit_s = self._settings.wall_s + _REPORT_GRACE_S
        try:
            done, _ = await asyncio.wait([future], timeout=limit_s)
        except asyncio.CancelledError:
            self._send_kill(run_id, "cancelled")
            raise
        if not done:
            self._fail(f"the sandbox server did not report the end of a program within {limit_s:.0f} s")
        return future.result()

    def _send_kill(self, run_id: int, reason: str) -> None:
        if self.failure is None:
            try:
                self._process.control.send(json.dumps({"kill": run_id, "reason": reason}).encode())
            except OSError as error:
                self._fail(f"the sandbox server does not take messages: {error}")


def _classify(outcome: dict[str, Any], truncated: bool, settings: Settings) -> tuple[ExecutionStatus, str]:
    """Status and detail of a run from the server's report."""
    reason, code = outcome["reason"], outcome["exit"]
    if reason == "setup":
        return ExecutionStatus.INFRASTRUCTURE, outcome["detail"]
    if truncated:
        return ExecutionStatus.OUTPUT_LIMIT, f"wrote more than {settings.output_bytes} bytes"
    if reason == "cpu" or (reason == "" and code == -signal.SIGXCPU):
        return ExecutionStatus.TIMEOUT, f"used {settings.cpu_s:g} s of CPU time"
    if reason == "wall":
        return ExecutionStatus.TIMEOUT, f"ran longer than {settings.wall_s:g} s"
    if reason == "disk":
        return ExecutionStatus.KILLED, f"wrote more than {settings.disk_mb} MiB to disk"
    if code < 0:
        return ExecutionStatus.KILLED, f"killed by signal {-code} ({signal.Signals(-code).name})"
    if code == EXIT_MEMORY:
        return ExecutionStatus.MEMORY, f"needed more than {settings.memory_mb} MiB"
    return (ExecutionStatus.OK if code == 0 else ExecutionStatus.ERROR), ""
