"""One guarded server: nothing of it is left behind, whatever ends first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from stand_in_fleet import StandInLaunch, gone, until

from spear_megatron.rollout.sglang import health
from spear_megatron.rollout.sglang.process import LocalServer, address_of


def started(launch: StandInLaunch) -> LocalServer:
    server = launch(0)
    until(lambda: health.answers(server.url))
    return server


def test_stop_ends_the_server_and_processes_that_left_its_session(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path, options=lambda _: ["--child", str(tmp_path / "child")])
    server = started(launch)
    own, child = launch.process().pid, int((tmp_path / "child").read_text())
    assert server.death() is None
    server.stop(5.0)
    assert gone(own) and gone(child) and gone(server.pid)
    assert "SIGTERM" in (server.death() or "")
    server.stop(5.0)


def test_a_stopped_process_is_killed_within_the_deadline(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path)
    server = started(launch)
    own = launch.process().pid
    os.kill(own, signal.SIGSTOP)
    until(lambda: psutil.Process(own).status() == psutil.STATUS_STOPPED)  # else the lower signal comes first
    began = time.monotonic()
    server.stop(0.3)
    assert gone(own) and time.monotonic() - began < 5.0
    assert "SIGKILL" in (server.death() or "")


def test_the_death_tells_the_code_and_the_last_lines(tmp_path: Path) -> None:
    server = StandInLaunch(tmp_path, options=lambda _: ["--exit", "3"])(0)
    death = until(server.death)
    assert "exited with code 3" in death and "out of memory, for instance" in death and "attempt_0.log" in death


def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    server = LocalServer(
        ["no_such_python"], url="http://x", environment=dict(os.environ), log=tmp_path / "log", grace_s=1.0
    )
    death = until(server.death)
    assert "code 127" in death and "cannot start no_such_python" in death


def test_a_full_disk_costs_the_log_and_not_the_server(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path, log=Path("/dev/full"))
    server = started(launch)
    assert health.generates(server.url)
    server.stop(2.0)
    launch.log = tmp_path / "file" / "log"
    (tmp_path / "file").write_text("a folder cannot be made here")
    server = started(launch)
    server.stop(2.0)
    assert "cannot be read" in (server.death() or "")


TRAINER = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from stand_in_fleet import StandInLaunch, until
from spear_megatron.rollout.sglang import health
folder = Path({folder!r})
launch = StandInLaunch(folder, options=lambda _: ["--child", str(folder / "child")])
server = launch(0)
until(lambda: health.answers(server.url))
import os
if os.fork() == 0: time.sleep(600)  # holds the line to the guard open
(folder / "pids").write_text(f"{{server.pid}} {{launch.process().pid}}")
time.sleep(600)
"""


def test_a_killed_trainer_leaves_no_server(tmp_path: Path) -> None:
    path = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    code = TRAINER.format(path=path, folder=str(tmp_path))
    trainer = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        until((tmp_path / "pids").exists)
        pids = until(lambda: [int(pid) for pid in (tmp_path / "pids").read_text().split()])
        pids.append(int((tmp_path / "child").read_text()))
        assert not any(gone(pid) for pid in pids)
        trainer.kill()
        trainer.wait()
        until(lambda: all(gone(pid) for pid in pids))
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)


def test_a_killed_guard_takes_the_server_along(tmp_path: Path) -> None:
    launch = StandInLaunch(tmp_path)
    server = started(launch)
    own = launch.process().pid
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: gone(own))
    assert "SIGKILL" in until(server.death)


def test_addresses() -> None:
    assert address_of("127.0.0.1", 1) == "http://127.0.0.1:1"
    assert address_of("::1", 2) == "http://[::1]:2"
    assert address_of("0.0.0.0", 3) == f"http://{socket.gethostname()}:3"
