"""What a run is made of: components, plain settings of a step, and what it remembers across a restart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spear_megatron.algorithms.schedules import Curriculum, ScheduledCurriculum
from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.data.batch_files import BatchFiles
from spear_megatron.data.prompts import PromptSource
from spear_megatron.observability.lineage import LineageStore
from spear_megatron.observability.record import Recorder
from spear_megatron.observability.trajectories import TrajectoryStore
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rewards.compose import RewardRule
from spear_megatron.rollout.collect import Collector
from spear_megatron.rollout.config import MismatchConfig
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.trainer.actor import Actor
from spear_megatron.trainer.imitation import Imitation
from spear_megatron.trainer.reference import Reference
from spear_megatron.types import Prompt, Row, Trajectory
from spear_megatron.weights.publisher import Published


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components a run is made of, built once by the command line layer."""

    parallel: ParallelState
    actor: Actor
    reference: Reference | None
    prompts: PromptSource
    val_prompts: Sequence[Prompt]
    collector: Collector
    checkpoints: CheckpointManager
    recorder: Recorder
    batch_files: BatchFiles
    trajectories: TrajectoryStore | None
    publish_weights: Callable[[int], Published | None]
    export: Callable[[Path], None]
    answer_of: Callable[[Trajectory], str | None]
    stop_requested: Callable[[], bool]
    curriculum: Curriculum = ScheduledCurriculum()
    imitation: Imitation | None = None
    lineage: LineageStore | None = None
    engine_metrics: Callable[[], dict[str, float]] | None = None
    to_training: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Plain values that the phases need.

    ``needs_old_log_probs``: something besides the ratio reads them (replay, covariance selection, correction, mask of
    mismatched trajectories), so that a step with a single update computes them too.
    ``max_segment_length``: tokens of the longest segment that prompt and response lengths allow; None bounds nothing.
    """

    prompts_per_step: int
    samples_per_prompt: int
    sampling: SamplingParams
    val_samples: int
    val_sampling: SamplingParams
    ppo_mini_batch_size: int
    ppo_epochs: int
    rule: RewardRule = RewardRule("per_turn", 1.0, 0.0, 0.0)
    rollout_filter_ratio: float = 1.0
    rollout_filter_type: str = "std"
    invalid_action_penalty: float = 0.0
    replay_update: Literal["joint", "separate"] = "joint"
    old_log_prob: Literal["trainer", "rollout"] = "trainer"
    needs_old_log_probs: bool = False
    mismatch: MismatchConfig = MismatchConfig()
    over_sampling: float = 1.0
    partial_rollout: bool = False
    max_segment_length: int | None = None


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """This rank's rows of one optimizer step: on-policy ones and replayed ones."""

    rows: list[Row]
    replayed: list[Row]


@dataclass
class Progress:
    """What the loop has to remember across a restart, besides weights, optimizer and prompts.

    ``spike_history``: what the loss-spike rule compared last, oldest first; replaced, never changed in place.
    """

    step: int = 0
    skipped_steps: int = 0
    nonfinite_steps: int = 0
    nonfinite_streak: int = 0
    loss_spikes: int = 0
    spike_streak: int = 0
    spike_history: list[float] = field(default_factory=list)
