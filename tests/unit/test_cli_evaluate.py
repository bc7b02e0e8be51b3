"""The command ``evaluate`` before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear_megatron.__main__ import main


def test_a_run_directory_is_no_place_for_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    kept = tmp_path / "trajectories" / "train" / "step_000003.0.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}\n")
    assert main(["evaluate", "--out", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert f"--out {tmp_path} is the directory of a run" in capsys.readouterr().err
    assert kept.exists()
