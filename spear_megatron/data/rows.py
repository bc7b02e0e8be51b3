"""From task groups to rows: one row per segment, with the trajectory's advantage spread over its sampled tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from spear_megatron.algorithms.kl import kl_penalty_in_reward
from spear_megatron.algorithms.mismatch import num_turns
from spear_megatron.types import Group, Row, Trajectory, TrajectoryId


def trajectory_rows(trajectory: Trajectory) -> list[Row]:
    """Rows of one trajectory, one per segment in order, with zero advantages and no trainer log-probs yet."""
    turns = [num_turns(segment.response_mask) for segment in trajectory.segments]
    return [
        Row(
            trajectory=trajectory.id,
            segment=position,
            ids=segment.ids,
            response_mask=segment.response_mask,
            rollout_log_probs=segment.rollout_log_probs,
            advantages=torch.zeros(len(segment.ids), dtype=torch.float32),
            policy_versions=segment.policy_versions,
            first_turn=1 + sum(turns[:position]),
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


def masked_row(row: Row) -> Row:
    """The row of a filtered trajectory: no token of it carries loss."""
    return replace(row, response_mask=torch.zeros_like(row.response_mask))


def with_advantages(
    rows: Sequence[Row],
    advantages: Mapping[TrajectoryId, float],
    step_advantages: Mapping[tuple[TrajectoryId, int], float] | None = None,
    step_weight: float = 1.0,
) -> list[Row]:
    """Rows whose sampled tokens carry their trajectory's advantage, plus ``step_weight`` times their segment's.

    Args:
        step_advantages: GiGPO's step term by (trajectory, segment); segments that are not there have none.

    Raises:
        KeyError: a row's trajectory has no advantage.
    """
    steps = step_advantages or {}

    def advantage(row: Row) -> float:
        return advantages[row.trajectory] + step_weight * steps.get((row.trajectory, row.segment), 0.0)

    return [replace(row, advantages=row.response_mask.float() * advantage(row)) for row in rows]


def kl_penalties(rows: Sequence[Row], *, kind: str, coef: float) -> dict[TrajectoryId, float]:
    """What KL-in-reward subtracts per trajectory, summed over its rows; rows need trainer and reference log-probs."""
    penalties: dict[TrajectoryId, float] = {}
    for row in rows:
        assert row.old_log_probs is not None and row.ref_log_probs is not None
        value = kl_penalty_in_reward(row.old_log_probs, row.ref_log_probs, row.response_mask, kind=kind, coef=coef)
        penalties[row.trajectory] = penalties.get(row.trajectory, 0.0) + value
    return penalties
