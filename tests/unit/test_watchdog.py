"""Signs of life on disk, and what happens when they stop."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from spear_megatron.observability.doctor import diagnose_run
from spear_megatron.observability.heartbeat import HANG_EXIT_CODE, HeartbeatFile, Watchdog, read_heartbeats


def until(condition: object, deadline_s: float = 20.0) -> None:
    """Wait for a callable to be true."""
    assert callable(condition)
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_heartbeat_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file, over, seen = HeartbeatFile(tmp_path, 3), threading.Event(), set()

    def read() -> None:
        while not over.is_set():
            for sign in read_heartbeats(tmp_path):  # a half-written file would not be JSON
                seen.add((sign["step"], sign["phase"]))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(300):
        file.write(step, "gen")
    over.set()
    reader.join()
    [last] = read_heartbeats(tmp_path)
    assert (last["rank"], last["step"], last["phase"]) == (3, 299, "gen") and abs(last["unix_time"] - time.time()) < 60
    assert len(seen) > 3 and [path.name for path in (tmp_path / "heartbeat").iterdir()] == ["rank_3.json"]


def test_a_disk_that_refuses_is_told_once_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heartbeat").write_text("in the way")
    file = HeartbeatFile(tmp_path, 0)
    file.write(1, "gen")
    file.write(2, "gen")
    assert capsys.readouterr().err.count("cannot be written") == 1


def stands_still(event: threading.Event) -> None:
    event.wait(30)


def test_a_hang_leaves_the_stacks_of_all_threads_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    event, codes = threading.Event(), list[int]()
    other = threading.Thread(target=stands_still, args=(event,))
    other.start()
    watchdog = Watchdog(tmp_path, 2, 0.2, "dump", codes.append)
    watchdog.beat(7, "update actor")
    path = tmp_path / "hang" / "rank_2_step_7_update-actor.txt"
    until(lambda: path.exists() and "stands_still" in path.read_text())
    time.sleep(0.5)
    event.set()
    watchdog.close()
    err = capsys.readouterr().err
    assert err.count("warning: rank 2, step 7, phase 'update actor': no progress for 0.2 s") == 1 and str(path) in err
    assert "until" in path.read_text() or "test_a_hang" in path.read_text()
    assert codes == []


def test_progress_keeps_the_watchdog_quiet_and_a_second_hang_is_told_again(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 0.4, "dump")
    for _ in range(20):
        watchdog.beat(1, "gen")
        time.sleep(0.05)
    assert not (tmp_path / "hang").exists()
    for step in (2, 3):
        watchdog.beat(step, "gen")
        until(lambda name=f"rank_0_step_{step}_gen.txt": (tmp_path / "hang" / name).exists())
    watchdog.close()


def test_stop_ends_the_process_and_the_doctor_names_the_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    watchdog = Watchdog(tmp_path, 5, 0.1, "stop", codes.append)
    until(lambda: bool(codes))
    watchdog.close()
    assert codes == [HANG_EXIT_CODE] and capsys.readouterr().err.startswith("error: rank 5, step 0")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"schema_version": 1, "step": 1, "unix_time": 1.0}) + "\n")
    finding = diagnose_run(tmp_path)[0]
    assert (finding.level, finding.name) == ("error", "a rank hung") and "rank 5, step 0" in finding.evidence
