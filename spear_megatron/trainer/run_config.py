"""Settings of one run: length, saving, testing, deadlines. Key names follow verl's ``trainer.*``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from spear_megatron.trainer.watch_config import LossSpikeConfig, ProfileConfig

_YEAR_S = 365 * 24 * 3600.0  # what every clock of a wait can hold
_MOST_THREADS = 4096


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """``trainer.*``: everything about the run that is not the algorithm."""

    total_training_steps: int = 100
    """Number of training steps; step numbers are 1-based."""
    seed: int = 0
    """Root of every random choice; keys are derived from (seed, purpose, step, ids)."""
    default_local_dir: str = "outputs/run"
    """Run directory: record, trajectories, checkpoints and the exported model."""
    save_freq: int = 10
    """Checkpoint every this many steps (and after the last one); -1 saves only at the end or on SIGTERM."""
    test_freq: int = 10
    """Evaluate on the held-out prompts every this many steps (and after the last one); -1 never."""
    async_: Literal[0, 1] = 0
    """1: while a step trains, the next one is rolled out with the weights before it, one step off; 0: in turn."""
    val_before_train: bool = True
    """Evaluate once before the first training step."""
    max_actor_ckpt_to_keep: int = 3
    """Newest complete checkpoints that stay on disk."""
    async_save: bool = False
    """Write checkpoints in the background; a later step boundary completes them."""
    resume_mode: Literal["auto", "disable"] = "auto"
    """auto: continue from the newest good checkpoint of the run directory; disable: refuse a used directory."""
    logger: tuple[str, ...] = ("console", "tensorboard")
    """Where the record goes besides metrics.jsonl, which is always written."""
    save_hf: bool = True
    """Export the trained model in Hugging Face format to <run directory>/hf when the run ends."""
    num_logged_trajectories: int = 8
    """Sampled trajectories kept per step for ``view``."""
    max_nonfinite_steps: int = 3
    """Stop after this many consecutive steps that were skipped for a non-finite loss or gradient."""
    collect_timeout_s: float = 1800.0
    """Deadline of one step's rollouts."""
    collective_timeout_s: float = 600.0
    """Deadline of every collective."""
    num_threads: int = 0
    """CPU threads per rank; 0 takes the usable cores divided by the local ranks."""
    hang_timeout_s: float = 3600.0
    """Seconds without progress of a rank after which the stacks of its threads are written to hang/; 0 never."""
    hang_action: Literal["dump", "stop"] = "dump"
    """What a hang leads to: dump: the stacks only; stop: the rank also ends with exit code 3, and with it the job."""
    loss_spike: LossSpikeConfig = field(default_factory=LossSpikeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if self.total_training_steps < 1:
            raise ValueError(f"trainer.total_training_steps must be at least 1, got {self.total_training_steps}")
        for name in ("save_freq", "test_freq"):
            value = getattr(self, name)
            if value == 0 or value < -1:
                raise ValueError(f"trainer.{name} must be -1 (off) or a positive number of steps, got {value}")
        for name in ("max_actor_ckpt_to_keep", "max_nonfinite_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("collect_timeout_s", "collective_timeout_s"):
            if not 0 < getattr(self, name) <= _YEAR_S:
                got = f"got {getattr(self, name):g}"
                raise ValueError(f"trainer.{name} must be a positive number of seconds, at most a year, {got}")
        self._check_hang()
        if self.num_threads > _MOST_THREADS:
            raise ValueError(f"trainer.num_threads must be at most {_MOST_THREADS}, got {self.num_threads}")
        if self.num_threads < 0 or self.num_logged_trajectories < 0 or self.seed < 0:
            names = "trainer.num_threads, trainer.num_logged_trajectories and trainer.seed"
            raise ValueError(f"{names} must not be negative")
        unknown = set(self.logger) - {"console", "tensorboard"}
        if unknown:
            raise ValueError(f"trainer.logger knows console and tensorboard, not {sorted(unknown)}")

    def _check_hang(self) -> None:
        if not 0 <= self.hang_timeout_s < math.inf:
            raise ValueError(f"trainer.hang_timeout_s must be seconds, or 0 for off, got {self.hang_timeout_s}")
        longest = max(self.collect_timeout_s, self.collective_timeout_s)
        if self.hang_action == "stop" and 0 < self.hang_timeout_s <= longest:
            raise ValueError(
                f"trainer.hang_timeout_s={self.hang_timeout_s:g} with hang_action=stop must exceed collect_timeout_s "
                f"and collective_timeout_s (the larger is {longest:g}), whose own messages say more"
            )


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """``sft.*``: the supervised cold start."""

    train_files: str | None = None
    """JSONL of conversations (``messages``, optional ``tools``), or a folder that the command ``corpus`` wrote; null
    takes demonstrations of the built-in tasks."""
    data_source: Literal["auto", "mmap", "dali"] = "auto"
    """What reads the conversations: mmap (memory-mapped files) or dali (NVIDIA DALI, the extra ``dali``), which give
    the same batches; auto takes DALI, if installed, for corpora of the form numpy, where it is faster."""
    num_examples: int = 1024
    """Built-in demonstrations to make (ignored when train_files is given)."""
    error_rate: float = 0.0
    """Share of built-in demonstrations whose program is wrong, so that reinforcement learning has something to mend."""
    tool_rate: float = 1.0
    """Chance of each next tool call in a built-in demonstration, which otherwise ends there with a wrong guess."""
    total_training_steps: int = 60
    """Optimizer steps."""
    train_batch_size: int = 64
    """Conversations per optimizer step, over all ranks."""
    lr: float = 3e-3
    """Peak learning rate, reached after warm-up and then decayed on a cosine to a tenth."""
    lr_warmup_steps: int = 5
    """Linear warm-up steps."""
    save_freq: int = -1
    """Checkpoint every this many steps and after the last one, and continue from the newest one of the run directory,
    on any number of ranks; -1 keeps none and starts anew."""
    default_local_dir: str = "outputs/sft"
    """Run directory of the cold start; the model is exported to its ``hf`` folder."""

    def __post_init__(self) -> None:
        for name in ("num_examples", "total_training_steps", "train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"sft.{name} must be at least 1, got {getattr(self, name)}")
        if self.train_files == "":
            raise ValueError("sft.train_files names no file: name one, or use null for built-in demonstrations")
        if self.save_freq != -1 and self.save_freq < 1:
            raise ValueError(f"sft.save_freq must be -1 (never) or at least 1, got {self.save_freq}")
        for name in ("error_rate", "tool_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"sft.{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.lr <= 0 or self.lr_warmup_steps < 0:
            raise ValueError("sft.lr must be positive and sft.lr_warmup_steps not negative")
