"""The command ``evaluate`` before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qwen_sizes import QWEN25_32B_CONFIG, QWEN3_32B_CONFIG

from spear_megatron.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_directory_is_no_place_for_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    kept = tmp_path / "trajectories" / "train" / "step_000003.0.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}\n")
    assert main(["evaluate", "--out", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert f"--out {tmp_path} is the directory of a run" in capsys.readouterr().err
    assert kept.exists()


@pytest.mark.parametrize("shape", [QWEN25_32B_CONFIG, QWEN3_32B_CONFIG], ids=["qwen2.5", "qwen3"])
@pytest.mark.parametrize("engine", [[], ["--engine", "sglang"], ["--engine", "openai", "--server", "http://h:1/v1"]])
def test_the_settings_of_aime_fit_published_models(
    shape: dict[str, object], engine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shape))
    options = ["--config", str(ROOT / "configs" / "evaluate_aime.yaml"), "--model", str(tmp_path), "--dry-run"]
    assert main(["evaluate", *options, "--out", str(tmp_path / "out"), *engine]) == 0
    shown = capsys.readouterr().out
    assert "max_response_length: 16384" in shown and "max_assistant_turns: 8" in shown and "'n': 32" in shown
    assert not (tmp_path / "out").exists()
