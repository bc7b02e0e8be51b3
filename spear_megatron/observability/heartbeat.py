"""A sign of life per rank on disk, and a thread that notices when it stops changing."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

HangAction = Literal["dump", "stop"]
HANG_EXIT_CODE = 3


class Sign(NamedTuple):
    """Where a rank was when it last made progress; ``since`` on the monotonic clock, in seconds."""

    step: int
    phase: str
    since: float


class HeartbeatFile:
    """``<run_dir>/heartbeat/rank_<k>.json``: rank, step, phase, unix_time (s), host, pid; replaced as a whole."""

    def __init__(self, run_dir: str | Path, rank: int) -> None:
        self._path = Path(run_dir) / "heartbeat" / f"rank_{rank}.json"
        self._facts = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._failed = False

    def write(self, step: int, phase: str) -> None:
        """Replace the file. A disk that refuses is told once, on standard error, and stops no training."""
        text = json.dumps({**self._facts, "step": step, "phase": phase, "unix_time": round(time.time(), 3)})
        staging = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            staging.write_text(text + "\n")
            staging.replace(self._path)
        except OSError as error:
            if not self._failed:
                print(f"warning: {self._path} cannot be written: {error}", file=sys.stderr, flush=True)
            self._failed = True


def read_heartbeats(run_dir: str | Path) -> list[dict[str, Any]]:
    """The last sign of every rank, by rank; empty without any."""
    found = [json.loads(path.read_text()) for path in (Path(run_dir) / "heartbeat").glob("rank_*.json")]
    return sorted(found, key=lambda sign: int(sign["rank"]))


class Watchdog:
    """A thread that dumps every thread's stack when :meth:`beat` was not called for ``timeout_s``.

    The stacks go to ``<run_dir>/hang/rank_<k>_step_<s>_<phase>.txt``, one line to standard error. ``stop`` then ends
    the process with exit code 3: a thread that waits in a collective cannot be told to stop in any other way.
    """

    def __init__(
        self,
        run_dir: str | Path,
        rank: int,
        timeout_s: float,
        action: HangAction,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._folder = Path(run_dir) / "hang"
        self._rank, self._timeout_s, self._action, self._leave = rank, timeout_s, action, leave
        self._sign = Sign(0, "start", time.monotonic())
        self._told: Sign | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """This rank made progress. Called from the main thread."""
        self._sign = Sign(step, phase, time.monotonic())

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout_s / 10)):
            sign = self._sign
            if sign is not self._told and time.monotonic() - sign.since > self._timeout_s:
                self._told = sign
                self._report(sign)

    def _report(self, sign: Sign) -> None:
        phase = re.sub(r"\W+", "-", sign.phase)
        path = self._folder / f"rank_{self._rank}_step_{sign.step}_{phase}.txt"
        where = f"rank {self._rank}, step {sign.step}, phase '{sign.phase}': no progress for {self._timeout_s:g} s"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"{where}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            told = f"the stacks of all threads are in {path}"
        except OSError as error:
            told = f"the stacks cannot be written: {error}"
        stops = self._action == "stop"
        print(f"{'error' if stops else 'warning'}: {where}; {told}", file=sys.stderr, flush=True)
        if stops:
            self._leave(HANG_EXIT_CODE)
