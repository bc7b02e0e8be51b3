"""Runs the real command line on a tiny model at the smallest useful sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DEADLINE_S = 120
SMALL = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.num_threads=1", "data.generator.levels=[1]",
    "data.generator.num_train=512", "data.generator.num_val=6", "data.max_prompt_length=64",
    "data.max_response_length=64", "env.sandbox.preload=[]",
)  # fmt: skip
SFT = ("sft.num_examples=512", "sft.total_training_steps=120", "sft.train_batch_size=16", "sft.lr=1e-2")
TRAIN = (
    "trainer.total_training_steps=6", "trainer.save_freq=4", "trainer.test_freq=3", "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.optim.lr=1e-3",
)  # fmt: skip


def command(*arguments: str | Path) -> list[str]:
    """``python -m spear_megatron`` with these arguments."""
    return [sys.executable, "-m", "spear_megatron", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread, and no colours or widths of the terminal that runs the tests."""
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "120", "NO_COLOR": "1"}


def run(*arguments: str | Path, code: int = 0) -> str:
    """Standard output of a command that must end with ``code``."""
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def train_arguments(model: Path, run_dir: Path) -> list[str]:
    """Arguments of a short training run."""
    return [
        "train", f"actor_rollout_ref.model.path={model}", f"trainer.default_local_dir={run_dir}", *SMALL, *TRAIN,
    ]  # fmt: skip
