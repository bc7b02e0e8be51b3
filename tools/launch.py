"""Run torchrun so that a stop signal lets its workers save and leaves exit code 0.

    python tools/launch.py [--grace-s 900] -- --nnodes 2 --nproc-per-node 8 ... -m spear_megatron train ...

torchrun alone answers SIGTERM by giving its workers 30 s before it kills them, and exits with 1 though they saved. Here
torchrun never sees SIGTERM or SIGUSR1: they go to the workers, again every few seconds because a worker that still
imports ignores them, and torchrun ends as its workers do. Everything is killed once the grace has passed.
In every argument ``{node}`` becomes the name of this node (SLURMD_NODENAME, else the host name).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_S, REPEAT_S = 0.2, 3.0


def parents() -> dict[int, int]:
    """Parent of every process that can be seen."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):  # it ended meanwhile
                continue
    return found


def workers_of(launcher: int) -> list[int]:
    """Children of torchrun: the ranks of this node."""
    return [pid for pid, parent in parents().items() if parent == launcher]


def family(root: int) -> list[int]:
    """``root`` and all its descendants."""
    known, everyone = [root], parents()
    for pid in known:
        known += [child for child, parent in everyone.items() if parent == pid]
    return known


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Signal processes that may have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Launcher:
    """torchrun with its ranks, and what became of the stop signals."""

    def __init__(self, arguments: Sequence[str], grace_s: float) -> None:
        self._grace_s = grace_s
        self._stop_since: float | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        # SIGINT is the one signal torchrun still answers itself, as on a terminal.
        command = [sys.executable, "-m", "torch.distributed.run", "--signals-to-handle=SIGINT", *arguments]
        self._process = subprocess.Popen(command, preexec_fn=_ignore_stop_signals)

    def wait(self) -> int:
        """Exit code of torchrun; 1 if it had to be killed after the grace."""
        told = 0.0
        while self._process.poll() is None:
            now = time.monotonic()
            if self._stop_since is not None and now - self._stop_since > self._grace_s:
                print(f"launch: not ended {self._grace_s:.0f} s after the stop signal: killed", file=sys.stderr)
                send(family(self._process.pid), signal.SIGKILL)
                self._process.wait()
                return 1
            if self._stop_since is not None and now - told > REPEAT_S:
                send(workers_of(self._process.pid), signal.SIGTERM)
                told = now
            time.sleep(POLL_S)
        return self._process.returncode if self._process.returncode >= 0 else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_since is None:
            self._stop_since = time.monotonic()


def _ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with the arguments after ``--``; the exit code is torchrun's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grace-s", type=float, default=900.0, help="seconds from the stop signal to SIGKILL")
    if "--" not in arguments:
        parser.parse_args(arguments)
        parser.error("give torchrun's own arguments after --")
    split = arguments.index("--")
    args = parser.parse_args(arguments[:split])
    if not args.grace_s >= 0:
        parser.error(f"--grace-s must not be negative, got {args.grace_s}")
    if not arguments[split + 1 :]:
        parser.error("give torchrun's own arguments after --")
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    return Launcher([text.replace("{node}", node) for text in arguments[split + 1 :]], args.grace_s).wait()


if __name__ == "__main__":
    sys.exit(main())
