"""A disk that is full: what people only look at is given up and counted, the record stops the run by name."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import DEADLINE_S, command, environment

from spear_megatron.data.tiny import make_tiny_model

SETTINGS = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.logger=[console]", "trainer.num_threads=1", "trainer.save_hf=false",
    "trainer.total_training_steps=3", "trainer.save_freq=-1", "trainer.test_freq=-1", "trainer.val_before_train=false",
    "data.generator.levels=[1]", "data.generator.num_train=16", "data.max_prompt_length=64",
    "data.max_response_length=12", "data.train_batch_size=2", "env.sandbox.preload=[]",
    "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.enable_trajectory_replay=false", "trainer.num_logged_trajectories=8",
)  # fmt: skip


def mounts_are_allowed() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def train_with_small_disk(tmp_path: Path, small: Path, size: str) -> subprocess.CompletedProcess[str]:
    """Train with ``small`` in a file system of that size."""
    model = make_tiny_model(tmp_path / "model", seed=0)
    arguments = ["train", f"actor_rollout_ref.model.path={model}", f"trainer.default_local_dir={tmp_path / 'run'}"]
    small.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size={size} none {shlex.quote(str(small))}"
    script = f"{mount} && {shlex.join(command(*arguments, *SETTINGS))}"
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env=environment(), capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not mounts_are_allowed(), reason="no mounts in a user namespace here")
def test_trajectories_that_cannot_be_kept_stop_nothing(tmp_path: Path) -> None:
    done = train_with_small_disk(tmp_path, tmp_path / "run" / "trajectories", "4k")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["training/trajectories_lost"] == 1 for line in lines)
    assert "trajectories of 1 ranks could not be kept" in done.stdout and "No space left on device" in done.stdout


@pytest.mark.skipif(not mounts_are_allowed(), reason="no mounts in a user namespace here")
def test_a_record_that_cannot_be_written_stops_the_run_and_is_named(tmp_path: Path) -> None:
    done = train_with_small_disk(tmp_path, tmp_path / "run", "24k")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and str(tmp_path / "run") in done.stderr
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
