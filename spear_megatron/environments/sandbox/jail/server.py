"""The fork server: holds the preloaded interpreter, forks one confined child per program, stops what exceeds a limit.

It speaks with its client in JSON messages over one SOCK_SEQPACKET socket. ``{"run": id}`` comes with three
descriptors: the source text, and where stdout and stderr go, so neither program text nor output passes through here
and nothing of one program is in the memory that the next one inherits. ``{"kill": id, "reason": text}`` stops a run.
The answers are ``{"ready": [modules], "scratch": folder}`` or ``{"failed": text}`` once, then one ``{"id", "exit",
"reason", "detail", "wall_s"}`` per run. When the client closes the socket or dies, everything here ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Protocol

from . import linux, program, runtime
from .confined import LandlockJail
from .namespaces import NamespaceJail
from .settings import READY, Settings

_MAX_MESSAGE_BYTES = 4096
_SHORTEST_WATCH_S = 0.02
_DISK_WATCH_S = 0.05
_IDLE_S = 3600.0
_TRIAL_S = 10.0
_MAX_FD = 1 << 16


class Jail(Protocol):
    """What a backend does for the server."""

    @property
    def scratch_root(self) -> str: ...

    def enter(self) -> None: ...

    def fork(self) -> int: ...

    def make_scratch(self, run_id: int) -> str:
        """Folder of a run, made before the fork."""
        ...

    def confine(self, scratch: str) -> None:
        """Isolate the forked child for good."""
        ...

    def disk_bytes(self, scratch: str) -> int:
        """Space that a run's files take on disk; 0 where it need not be watched."""
        ...

    def remove_scratch(self, scratch: str) -> None:
        """Delete what an ended run left."""
        ...

    def leave(self) -> None: ...


@dataclass
class _Run:
    id: int
    pid: int
    pidfd: int
    ready_fd: int
    scratch: str
    started: float
    watch_at: float
    reason: str = ""


class Server:
    """Event loop over the control socket and the running programs. Single-threaded, never blocks on a program."""

    def __init__(self, control: socket.socket, jail: Jail, settings: Settings) -> None:
        self._control = control
        self._jail = jail
        self._settings = settings
        self._pid = os.getpid()
        self._runs: dict[int, _Run] = {}
        self._selector = selectors.DefaultSelector()
        self._watches_disk = bool(jail.scratch_root)
        self._processors = len(os.sched_getaffinity(0))

    def try_once(self) -> None:
        """Confine and end one empty program, to find out now what the kernel refuses.

        Raises:
            OSError: what was refused.
        """
        null = [os.open(os.devnull, os.O_RDWR) for _ in range(3)]
        run = self._fork(0, null)
        self._selector.register(run.pidfd, selectors.EVENT_READ, run)
        self._selector.select(_TRIAL_S)
        os.kill(run.pid, signal.SIGKILL)
        outcome = self._reap(run)
        if outcome["reason"] or outcome["exit"] != 0:
            raise OSError(outcome["detail"] or f"an empty program ended with exit code {outcome['exit']}")

    def serve(self) -> None:
        """Serve until the client closes the control socket."""
        self._control.setblocking(False)
        self._selector.register(self._control, selectors.EVENT_READ, None)
        while True:
            now = time.monotonic()
            next_watch = min((run.watch_at for run in self._runs.values()), default=now + _IDLE_S)
            for key, _ in self._selector.select(max(0.0, next_watch - now)):
                if key.data is not None:
                    self._send(self._reap(key.data))
                elif not self._receive():
                    return
            for run in self._runs.values():
                if run.watch_at <= time.monotonic():
                    self._watch(run)

    def stop(self) -> None:
        """Kill what still runs and delete the scratch folders."""
        for run in list(self._runs.values()):
            os.kill(run.pid, signal.SIGKILL)
            self._reap(run)
        self._jail.leave()

    def _send(self, message: dict[str, object]) -> None:
        self._control.setblocking(True)
        try:
            self._control.send(json.dumps(message).encode())
        finally:
            self._control.setblocking(False)

    def _receive(self) -> bool:
        """Handle one message; False when the client is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, _MAX_MESSAGE_BYTES, 3)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if not data:
            return False
        message = json.loads(data)
        if "kill" in message:
            run = self._runs.get(message["kill"])
            if run is not None:
                self._stop(run, message["reason"])
            return True
        try:
            self._start(message["run"], list(fds))
        except OSError as error:
            self._send({"id": message["run"], "exit": 0, "reason": "setup", "detail": str(error), "wall_s": 0.0})
        return True

    def _start(self, run_id: int, fds: list[int]) -> None:
        run = self._fork(run_id, fds)
        self._runs[run_id] = run
        self._selector.register(run.pidfd, selectors.EVENT_READ, run)

    def _fork(self, run_id: int, fds: list[int]) -> _Run:
        ready_fd, child_ready_fd = os.pipe()
        fds.append(child_ready_fd)
        try:
            scratch = self._jail.make_scratch(run_id)
            started = time.monotonic()
            pid = self._jail.fork()
            if pid == 0:
                self._become_program(fds, scratch)
        except OSError:
            os.close(ready_fd)
            raise
        finally:
            for fd in fds:
                os.close(fd)
        pidfd = os.pidfd_open(pid)
        os.set_blocking(ready_fd, False)
        return _Run(run_id, pid, pidfd, ready_fd, scratch, started, watch_at=started)

    def _become_program(self, fds: list[int], scratch: str) -> None:
        """In the forked child: isolate, report that it worked, and turn into the program. Never returns."""
        try:
            linux.die_with_parent()
            if os.getppid() not in (0, self._pid):
                os._exit(1)
            os.setsid()  # a signal to its own process group must not reach the server
            code_fd, stdout, stderr, ready = fds
            with open(code_fd, "rb", closefd=False) as file:
                source = file.read().decode("utf-8", "surrogatepass")
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            self._jail.confine(scratch)
            os.closerange(3, ready)
            os.closerange(ready + 1, _MAX_FD)
            os.write(ready, READY)
            os.close(ready)
        except BaseException as error:
            os.write(fds[3], f"{type(error).__name__}: {error}".encode()[:_MAX_MESSAGE_BYTES])
            os._exit(1)
        program.run(source, scratch)

    def _watch(self, run: _Run) -> None:
        """Stop a run that used up its CPU time, wall time or disk; else set when to look again."""
        now = time.monotonic()
        try:
            cpu_s = linux.process_cpu_s(run.pid)
        except OSError:  # it has ended, and its descriptor will tell
            run.watch_at = now + _SHORTEST_WATCH_S
            return
        cpu_left = self._settings.cpu_s - cpu_s
        wall_left = run.started + self._settings.wall_s - now
        if cpu_left <= 0 or wall_left <= 0:
            self._stop(run, "cpu" if cpu_left <= 0 else "wall")
            return
        wait = min(wall_left, cpu_left / self._processors)
        if self._watches_disk:
            wait = min(wait, _DISK_WATCH_S)
            if self._jail.disk_bytes(run.scratch) > self._settings.disk_mb << 20:
                self._stop(run, "disk")
                return
        run.watch_at = now + max(wait, _SHORTEST_WATCH_S)

    def _stop(self, run: _Run, reason: str) -> None:
        run.reason = run.reason or reason
        run.watch_at = time.monotonic() + _IDLE_S
        os.kill(run.pid, signal.SIGKILL)

    def _reap(self, run: _Run) -> dict[str, object]:
        """Collect an ended run. Its namespace, if any, is empty by now: the kernel waits for that."""
        _, status = os.waitpid(run.pid, 0)
        wall_s = time.monotonic() - run.started
        self._selector.unregister(run.pidfd)
        os.close(run.pidfd)
        try:
            report = os.read(run.ready_fd, _MAX_MESSAGE_BYTES)
        except BlockingIOError:
            report = b""
        os.close(run.ready_fd)
        self._runs.pop(run.id, None)
        reason, detail = run.reason, ""
        if report != READY and not reason:
            reason, detail = "setup", report.decode(errors="replace") or "the child died while it was set up"
        if self._watches_disk and not reason and self._jail.disk_bytes(run.scratch) > self._settings.disk_mb << 20:
            reason = "disk"
        self._jail.remove_scratch(run.scratch)
        exit_code = os.waitstatus_to_exitcode(status)
        return {"id": run.id, "exit": exit_code, "reason": reason, "detail": detail, "wall_s": wall_s}


def main() -> None:
    """Entry point: settings as JSON in argument 1, descriptor of the control socket in argument 2."""
    settings = Settings.from_json(sys.argv[1])
    control = socket.socket(fileno=int(sys.argv[2]))
    sys.path.remove(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # when memory runs out, the kernel should end a program and not the trainer
    try:
        runtime.start_interpreter(settings.packages)
        loaded = runtime.preload(settings.preload)
        jail: Jail = NamespaceJail(settings) if settings.backend == "namespaces" else LandlockJail(settings)
        jail.enter()
        server = Server(control, jail, settings)
        server.try_once()
    except Exception as error:
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        raise SystemExit(1) from error
    control.send(json.dumps({"ready": loaded, "scratch": jail.scratch_root}).encode())
    server.serve()
    server.stop()
    os._exit(0)
