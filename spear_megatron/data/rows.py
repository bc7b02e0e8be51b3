"""From task groups to rows: one row per segment, with the trajectory's advantage spread over its sampled tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from spear_megatron.algorithms.advantages import grpo_advantages
from spear_megatron.algorithms.kl import kl_penalty_in_reward
from spear_megatron.types import Group, Row, Trajectory, TrajectoryId


def trajectory_rows(trajectory: Trajectory) -> list[Row]:
    """Rows of one trajectory, one per segment in order, with zero advantages and no trainer log-probs yet."""
    return [
        Row(
            trajectory=trajectory.id,
            segment=position,
            ids=segment.ids,
            response_mask=segment.response_mask,
            rollout_log_probs=segment.rollout_log_probs,
            advantages=torch.zeros(len(segment.ids), dtype=torch.float32),
        )
        for position, segment in enumerate(trajectory.segments)
    ]


def group_rows(groups: Iterable[Group]) -> list[Row]:
    """Rows of every valid trajectory; infrastructure failures have none, so they can enter no loss."""
    return [row for group in groups for member in group.trajectories if member.valid for row in trajectory_rows(member)]


def conversation_row(index: int, ids: torch.Tensor, loss_mask: torch.Tensor) -> Row:
    """Row of one supervised conversation.

    Args:
        index: position in the data set, which becomes the row's id.
        ids: int32 [n]. loss_mask: bool [n], True on the tokens to learn.
    """
    zeros = torch.zeros(len(ids), dtype=torch.float32)
    return Row(
        trajectory=TrajectoryId(step=0, task=index, sample=0),
        segment=0,
        ids=ids,
        response_mask=loss_mask,
        rollout_log_probs=zeros,
        advantages=zeros,
    )


def trajectory_advantages(rewards: Mapping[TrajectoryId, float], *, norm_by_std: bool) -> dict[TrajectoryId, float]:
    """Advantage of every trajectory from the rewards of the step.

    Args:
        rewards: shaped reward of every valid trajectory, whole groups; infrastructure failures are left out.
        norm_by_std: ``algorithm.norm_adv_by_std_in_grpo``.
    """
    ids = sorted(rewards)
    values = torch.tensor([rewards[key] for key in ids], dtype=torch.float64)
    valid = torch.ones(len(ids), dtype=torch.bool)
    advantages = grpo_advantages(values, [key.group for key in ids], valid, norm_by_std=norm_by_std)
    return dict(zip(ids, advantages.tolist(), strict=True))


def with_advantages(rows: Sequence[Row], advantages: Mapping[TrajectoryId, float]) -> list[Row]:
    """Rows whose sampled tokens carry their trajectory's advantage.

    Raises:
        KeyError: a row's trajectory has no advantage.
    """
    return [replace(row, advantages=row.response_mask.float() * advantages[row.trajectory]) for row in rows]


def kl_penalties(rows: Sequence[Row], *, kind: str, coef: float) -> dict[TrajectoryId, float]:
    """What KL-in-reward subtracts per trajectory, summed over its rows; rows need trainer and reference log-probs."""
    penalties: dict[TrajectoryId, float] = {}
    for row in rows:
        assert row.old_log_probs is not None and row.ref_log_probs is not None
        value = kl_penalty_in_reward(row.old_log_probs, row.ref_log_probs, row.response_mask, kind=kind, coef=coef)
        penalties[row.trajectory] = penalties.get(row.trajectory, 0.0) + value
    return penalties
