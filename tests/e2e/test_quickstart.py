"""The quickstart, shortened: every stage runs, and its summary and artefacts have the promised form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    "sft.total_training_steps=30",
    "sft.num_examples=200",
    "data.generator.num_val=12",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.actor.trajectory_buffer_size=2",
    "trainer.total_training_steps=2",
)


@pytest.mark.slow
def test_every_stage_of_the_quickstart(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--out", str(out), *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2
    for part in ("sft", "final"):
        low, high = summary[part]["ci95"]
        assert 0.0 <= low <= summary[part]["success_rate"] <= high <= 1.0
    assert set(summary["seconds"]) == {"model", "sft", "sft_evaluation", "rl", "final_evaluation", "total"}
    assert 0 < summary["spear"]["mean_gamma"] < 0.1 and summary["spear"]["steps_with_replay"] <= 2
    assert (Path(summary["hf_export"]) / "model.safetensors").is_file()
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "plain transformers loads" in done.stdout and "success of the training rollouts" in done.stdout
