"""Runs one server and leaves nothing of it behind: ``python guard.py LOG GRACE_S COMMAND...``, standard library only.

Standard input is the line to the trainer. Its end (the trainer is gone, however it died) or a SIGTERM ends the server:
SIGTERM, then after GRACE_S seconds SIGKILL for every process below this one. The byte ``k`` kills at once. The guard
is a subreaper, so that processes whose parent died stay below it. What the server prints goes through the guard into
LOG: a full disk costs the log, not the server. The guard exits like the server did.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MAX_LOG_BYTES = 256 << 20
_CHUNK = 1 << 16


def parents() -> dict[int, int]:
    """Parent of every process of this machine."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def descendants_of(pid: int) -> list[int]:
    """Every process below ``pid``."""
    parent_of, below = parents(), [pid]
    for current in below:  # grows while it is walked
        below += [child for child, parent in parent_of.items() if parent == current]
    return below[1:]


def kill_descendants(pid: int) -> None:
    """SIGKILL everything below ``pid`` until nothing is left; processes may fork meanwhile."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        alive = descendants_of(pid)
        for child in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        reap()
        if not alive:
            return
        time.sleep(0.02)


def reap() -> dict[int, int]:
    """Collect every child that has ended: exit codes (negative: signals) by process."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


class Log:
    """Appends to a file as long as that works and its size is within bounds."""

    def __init__(self, path: str) -> None:
        self._left = _MAX_LOG_BYTES
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, data: bytes) -> None:
        """Append what fits; a failure is no failure of the server."""
        if self._fd >= 0 and self._left > 0:
            with contextlib.suppress(OSError):
                self._left -= os.write(self._fd, data[: self._left])


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """The server, in this process group; it dies with the guard, though that be killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def die_with_guard() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=die_with_guard
    )


def main(log_path: str, grace_s: float, command: list[str]) -> int:
    """Run ``command`` to its end and return its exit code, 128 + n after signal n, 127 if it cannot be started."""
    log = Log(log_path)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.append("stop"))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        server = start(command)
    except OSError as error:
        log.write(f"cannot start {command[0]}: {error}\n".encode())
        return 127
    assert server.stdout is not None
    output = server.stdout.fileno()
    code = _serve(server.pid, output, wake_read, log, grace_s, asked)
    kill_descendants(os.getpid())
    _drain(output, log)
    return code if code >= 0 else 128 - code


def _serve(pid: int, output: int, wake: int, log: Log, grace_s: float, asked: list[str]) -> int:
    """Pump the log until the server has ended or its time is up."""
    watched, kill_at, trainer = [0, output, wake], float("inf"), os.getppid()
    while True:
        if os.getppid() != trainer:  # a fork of the trainer may still hold the line open
            asked.append("stop")
        if asked and kill_at == float("inf"):
            kill_at = time.monotonic() + grace_s
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        ended = reap()
        if pid in ended:
            return ended[pid]
        if time.monotonic() >= kill_at:
            return -signal.SIGKILL
        ready, _, _ = select.select(watched, [], [], min(1.0, max(0.0, kill_at - time.monotonic())))
        if wake in ready:
            os.read(wake, _CHUNK)
        if output in ready:
            data = os.read(output, _CHUNK)
            log.write(data)
            if not data:
                watched.remove(output)
        if 0 in ready:
            word = os.read(0, 1)
            if word == b"k":
                return -signal.SIGKILL
            if not word:
                watched.remove(0)
                asked.append("stop")


def _drain(output: int, log: Log) -> None:
    os.set_blocking(output, False)
    with contextlib.suppress(BlockingIOError):
        while data := os.read(output, _CHUNK):
            log.write(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
