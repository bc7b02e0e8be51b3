"""The kill test's own logic, on a stand-in that trains in a second."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

STAND_IN = Path(__file__).with_name("kill_stand_in.py")


@pytest.fixture(scope="module")
def kill_test() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "kill_test.py"
    spec = importlib.util.spec_from_file_location("kill_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_test"] = module
    spec.loader.exec_module(module)
    return module


def test_kills_leave_no_trace(kill_test: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    options = ["--kills", "8", "--work", str(work), "--seed", "3", "--save-share", "0.7"]
    code = kill_test.main([*options, "--", sys.executable, str(STAND_IN), "{run}"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    summary = json.loads((work / "summary.json").read_text())
    assert summary["passed"] and len(summary["kills"]) == 8
    assert any(kill["during_save"] for kill in summary["kills"])
    assert any(kill["newest_checkpoint"] > 0 for kill in summary["kills"])
    assert sum(outcome["kills"] for outcome in summary["outcomes"]) == 8
    assert "8 kills" in printed


def test_the_demonstration_kills_inside_a_save(
    kill_test: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    assert kill_test.main(["--demo", "--work", str(work), "--", sys.executable, str(STAND_IN), "{run}"]) == 0
    assert json.loads((work / "summary.json").read_text())["kills"][-1]["during_save"]
    lines = capsys.readouterr().out.splitlines()
    hashes = [line.split()[-1] for line in lines if line.startswith(("undisturbed: ", "killed and resumed: "))]
    assert len(hashes) == 2 and hashes[0] == hashes[1]


def test_a_state_that_is_not_restored_is_found(kill_test: ModuleType, tmp_path: Path) -> None:
    work = tmp_path / "work"
    command = [sys.executable, str(STAND_IN), "{run}", "--forgetful"]
    assert kill_test.main(["--kills", "4", "--work", str(work), "--save-share", "1", "--", *command]) == 1
    summary = json.loads((work / "summary.json").read_text())
    different = [outcome for outcome in summary["outcomes"] if outcome["difference"]]
    assert different and "loss" in different[0]["difference"]
    assert different[0]["weights"] != summary["reference_weights"]


def test_a_command_that_fails_is_shown(kill_test: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3.*the reason"):
        kill_test.main(["--kills", "1", "--work", str(tmp_path / "work"), "--", *command])


def test_every_process_dies_even_in_another_session(kill_test: ModuleType, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(60)\n"
    )
    attempt = kill_test.Attempt([sys.executable, "-c", script], tmp_path, tmp_path / "log")
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pid = int(pid_file.read_text())
    attempt.kill()
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)


def test_differences_are_exact_and_named(kill_test: ModuleType) -> None:
    one = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
    assert kill_test.first_difference(one, [dict(line) for line in one]) == ""
    moved = [one[0], {"step": 2, "loss": 0.2 + 1e-16 + 5e-17}]
    assert "line 2 (step 2), loss: 0.2 became 0.2000000000000" in kill_test.first_difference(one, moved)
    assert kill_test.first_difference(one, one[:1]) == "2 lines became 1"
    assert "extra" in kill_test.first_difference(one[:1], [{**one[0], "extra": None}])


def test_timings_and_cut_lines_are_left_out(kill_test: ModuleType, tmp_path: Path) -> None:
    line = {"step": 1, "unix_time": 3.0, "timing_s/step": 1.0, "perf/tokens_per_s": 9.0, "loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 2, "lo')
    assert kill_test.read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_the_folder_is_made_anew_and_nobody_elses_is_touched(kill_test: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "above" / "work"
    kill_test.renew_folder(folder)
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("{}")
    kill_test.renew_folder(folder)
    assert not (folder / "run").exists()
    (tmp_path / "file").write_text("x")
    for place, reason in ((tmp_path, "something else"), (tmp_path / "file", "a file in its place")):
        with pytest.raises(ValueError, match=reason):
            kill_test.renew_folder(place)
    assert (tmp_path / "file").read_text() == "x" and folder.is_dir()


def test_the_stand_in_starts_without_torch() -> None:
    code = "import sys; import spear_megatron.checkpoint.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
