"""One server of this machine as a guarded child process: its log, its death."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from spear_megatron.rollout.sglang import guard

_TAIL_LINES = 15
_TAIL_BYTES = 1 << 14
_EXIT_MARGIN_S = 15.0  # what the guard may need beyond the grace: it waits at most 10 s for killed processes


class ServerHandle(Protocol):
    """A started server, wherever it runs. Methods may be called from any one thread at a time."""

    @property
    def url(self) -> str:
        """Address of its endpoints."""
        ...

    def death(self) -> str | None:
        """None while it runs; else how it ended, with the last lines of its log."""
        ...

    def log_tail(self) -> str:
        """Last lines of its log."""
        ...

    def stop(self, grace_s: float) -> None:
        """End it and all its processes: asked first, killed after ``grace_s`` seconds (0: at once)."""
        ...


Launch = Callable[[int, str | None], ServerHandle]
"""Starts the server of one attempt (0, 1, ...) at an address that others know already, or at one that it chooses.

Raises EngineError or OSError when it cannot.
"""


def address_of(host: str, port: int) -> str:
    """URL of a server; one that listens everywhere is addressed by this machine's name."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


class LocalServer:
    """A server in a session of its own below a guard, which ends it when this process is gone.

    Args:
        command: program and arguments.
        url: where it will answer.
        environment: all of its environment variables.
        log: file that its output is appended to; where it cannot be written the output is lost, not the server.
        grace_s: time that it has to end by itself when this process disappears.

    Raises:
        OSError: the guard cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, url: str, environment: Mapping[str, str], log: Path, grace_s: float
    ) -> None:
        self._url = url
        self._log = log
        with contextlib.suppress(OSError):  # a full disk is the log's problem
            log.parent.mkdir(parents=True, exist_ok=True)
        guarded = [sys.executable, "-I", "-S", guard.__file__, str(log), f"{grace_s:g}", *command]
        self._process = subprocess.Popen(
            guarded, stdin=subprocess.PIPE, env=dict(environment), start_new_session=True, stdout=subprocess.DEVNULL
        )

    @property
    def url(self) -> str:
        """Address of its endpoints."""
        return self._url

    @property
    def pid(self) -> int:
        """Process id of the guard, which leads the session of the server."""
        return self._process.pid

    def death(self) -> str | None:
        """See :class:`ServerHandle`."""
        code = self._process.poll()
        if code is None:
            return None
        return f"the server at {self._url} {_ended(code)}\n{self.log_tail()}".rstrip()

    def log_tail(self) -> str:
        """See :class:`ServerHandle`."""
        try:
            with self._log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"(its log {self._log} cannot be read: {error.strerror})"
        return "\n".join([f"last lines of {self._log}:", *lines[-_TAIL_LINES:]])

    def stop(self, grace_s: float) -> None:
        """See :class:`ServerHandle`. Returns when nothing of it runs any more, after ``grace_s`` and 15 s at most."""
        if self._process.poll() is None and grace_s > 0:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            self._wait(grace_s)
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.write(b"k")
                self._process.stdin.flush()
            self._wait(_EXIT_MARGIN_S)
        if self._process.poll() is None:  # the guard itself is stuck: its death takes the server along
            below = guard.descendants_of(self._process.pid)
            for pid in (*below, self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._wait(_EXIT_MARGIN_S)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)


def _ended(code: int) -> str:
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(number).name}"
    return f"exited with code {code}"
