"""What the batch scripts start: torchrun that lets its ranks save, and the wait for servers."""

from __future__ import annotations

import http.server
import importlib.util
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("launch_stand_in.py")
DEADLINE_S = 90.0


def launch(folder: Path, grace_s: float, import_s: float, save_s: float) -> subprocess.Popen[str]:
    """tools/launch.py with two ranks."""
    command = [
        sys.executable, "tools/launch.py", "--grace-s", str(grace_s), "--", "--standalone", "--nproc-per-node=2",
        str(STAND_IN), str(folder), str(import_s), str(save_s),
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def both(folder: Path, what: str) -> bool:
    return all((folder / f"{what}_{rank}").exists() for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_may_save_longer_than_torchrun_allows_and_the_exit_code_is_zero(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = launch(tmp_path, 80.0, import_s=0.0, save_s=34.0 if number == signal.SIGTERM else 1.0)
    until(lambda: both(tmp_path, "handling"))
    # A scheduler may signal every process, torchrun too.
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
        member.send_signal(number)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0 and both(tmp_path, "saved"), err


def test_a_signal_during_the_import_is_not_lost(tmp_path: Path) -> None:
    process = launch(tmp_path, 60.0, import_s=2.0, save_s=0.0)
    until(lambda: both(tmp_path, "started"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0 and both(tmp_path, "saved"), err


def test_ranks_that_do_not_end_are_killed_after_the_grace(tmp_path: Path) -> None:
    process = launch(tmp_path, 1.0, import_s=0.0, save_s=300.0)
    until(lambda: both(tmp_path, "handling"))
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1 and "not ended 1 s after the stop signal" in err
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert len(gone) >= 3 and not alive


class Health(http.server.BaseHTTPRequestHandler):
    """503 twice, then 200."""

    count = 0

    def do_GET(self) -> None:  # noqa: N802
        Health.count += 1
        self.send_response(200 if self.path == "/health" and Health.count > 2 else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    Health.count = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def wait_ready(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/wait_ready.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_wait_ends_when_all_servers_answer(url: str) -> None:
    done = wait_ready("--deadline-s", "30", url)
    assert done.returncode == 0 and Health.count == 3, done.stderr


def test_the_wait_names_what_is_missing_at_its_deadline(url: str) -> None:
    done = wait_ready("--deadline-s", "4", url, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert re.search(r"error: no answer after 4 s from http://127.0.0.1:9: ", done.stderr)


def test_the_wait_ends_with_the_process_that_runs_the_servers() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        done = wait_ready("--deadline-s", "600", "--pid", str(ended.pid), "http://127.0.0.1:9")
    assert done.returncode == 1 and f"process {ended.pid} ended" in done.stderr


def test_the_name_of_the_node_is_put_into_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("launch_under_test", ROOT / "tools" / "launch.py")
    assert spec is not None and spec.loader is not None
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    seen: list[list[str]] = []

    class Recorded:
        def __init__(self, arguments: list[str], grace_s: float) -> None:
            seen.append(arguments)

        def wait(self) -> int:
            return 5

    monkeypatch.setattr(launch, "Launcher", Recorded)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert launch.main(["--", "-m", "x", "a.host={node}", "args={key: 1}"]) == 5
    assert seen == [["-m", "x", "a.host=n7", "args={key: 1}"]]
