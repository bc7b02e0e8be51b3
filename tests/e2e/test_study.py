"""The study at the smallest useful size: killed without notice in the middle, continued, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from spear_megatron.observability.record import read_record

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 400
SMALL = {
    "sft.total_training_steps": 8, "sft.num_examples": 64, "sft.train_batch_size": 8, "data.generator.num_train": 64,
    "data.generator.num_val": 4, "data.train_batch_size": 2, "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
    "actor_rollout_ref.rollout.n": 2, "trainer.test_freq": 2, "trainer.save_freq": 2,
    "trainer.total_training_steps": 12,
}  # fmt: skip


def command(study: Path, out: Path) -> list[str]:
    return [
        sys.executable, str(ROOT / "tools" / "study.py"), "--study", str(study), "--seeds", "2", "--jobs", "1",
        "--out", str(out), "--docs", str(out / "docs"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_study_continues(tmp_path: Path) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    task = {
        "config": str(ROOT / "configs" / "study_tool_math.yaml"), "token_budget": 1e9, "overrides": SMALL,
        "prepare": [["-m", "spear_megatron.data.tiny", "{start}/model"]],
    }  # fmt: skip
    study.write_text(yaml.safe_dump({"arms": {"grpo": {}}, "baselines": ["grpo"], "tasks": {"tiny": task}}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = out / "tiny" / "runs" / "grpo" / "seed_1"
    process = subprocess.Popen(command(study, out), env=environment)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not list(first.glob("checkpoints/step_*/manifest.json")):
            assert process.poll() is None and time.monotonic() < deadline, "the first run never saved"
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (first / "study_done.json").exists()
    done = subprocess.run(command(study, out), env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cold start took" not in done.stdout and "SHORT of the token budget" in done.stdout
    assert "continuing after step" in (first / "study_run.log").read_text()
    for seed in (1, 2):
        folder = first.parent / f"seed_{seed}"
        assert [line["step"] for line in read_record(folder)] == list(range(13))
        assert json.loads((folder / "study_done.json").read_text())["reached_budget"] == 0.0
    text = (out / "docs" / "study.md").read_text()
    assert "was not reached by every run" in text and "| grpo | of the configuration | 2 |" in text
