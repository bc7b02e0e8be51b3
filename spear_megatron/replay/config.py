"""Keys of ``actor_rollout_ref.actor.replay.*``: what SPEAR's own keys leave open. Defaults follow the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_PREFIX = "actor_rollout_ref.actor.replay"


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How trajectories enter the buffer, when and how they are replayed, and how they are kept.

    N_D stands for ``actor_rollout_ref.actor.trajectory_buffer_size``.

    Attributes:
        update: joint adds the self-imitation term to every optimizer step; separate lets replay mini-batches with
            optimizer steps of their own follow (the released code).
        require: what a trajectory needs besides its advantage to be pushed: success, a tool_call, or none.
        trigger_ratio: replay once the buffer counts this many times N_D (0: as soon as it holds anything).
        trigger_count: stored counts all trajectories, qualifying those whose recalibrated advantage is positive.
        capacity_ratio: the buffer keeps at most this many times N_D, dropping the oldest (0: no such bound).
        max_gib: bound of the buffer over all ranks in GiB, dropping the oldest.
        batch_size: trajectories replayed per training step; null takes a quarter of those that the step samples.
        power_of_two: replay at most the largest power of two of the qualifying trajectories, none for one alone (the
            released code; N_D and batch_size bound it too).
        after_use: keep the replayed trajectories, or clear the whole buffer.
        staleness: exact drops what is older than trajectory_tolerate_steps; released caps that at 10 and counts
            from the last push, so that data may be two steps older.
        recompose: rewards and baseline at today's tool-call coefficient, or as they were when stored.
        sampling: uniform, or prioritized by the recalibrated advantage.
        baseline_groups: P50 over all groups of a step, or over those that the group filter kept (the released code).
        step_term: keep or drop the step advantage of gigpo in replayed trajectories; with drop the recalibrated
            advantage is scaled by norm_adv_by_std_in_grpo, as the released code does, instead of gigpo.mode.
        entropy_bonus: apply entropy_coeff to replayed tokens too (the released code).
        segment_mib: size at which a file of the buffer is sealed, in MiB.
    """

    update: Literal["joint", "separate"] = "joint"
    require: Literal["success", "tool_call", "none"] = "success"
    trigger_ratio: float = 1.0
    trigger_count: Literal["stored", "qualifying"] = "stored"
    capacity_ratio: float = 1.0
    max_gib: float = 32.0
    batch_size: int | None = None
    power_of_two: bool = False
    after_use: Literal["keep", "clear"] = "keep"
    staleness: Literal["exact", "released"] = "exact"
    recompose: Literal["today", "stored"] = "today"
    sampling: Literal["uniform", "prioritized"] = "uniform"
    baseline_groups: Literal["all", "kept"] = "all"
    step_term: Literal["keep", "drop"] = "keep"
    entropy_bonus: bool = False
    segment_mib: float = 64.0

    def __post_init__(self) -> None:
        for name in ("trigger_ratio", "capacity_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_PREFIX}.{name} must not be negative, got {getattr(self, name)}.")
        for name in ("max_gib", "segment_mib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{_PREFIX}.{name} must be positive, got {getattr(self, name)}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"{_PREFIX}.batch_size must be at least 1, or null, got {self.batch_size}.")
        if 0 < self.capacity_ratio < self.trigger_ratio:
            raise ValueError(
                f"{_PREFIX}.trigger_ratio={self.trigger_ratio} is never reached with capacity_ratio="
                f"{self.capacity_ratio}: lower it to at most the capacity."
            )
