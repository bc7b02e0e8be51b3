"""What a step's trajectories are worth: shaped rewards, filters, group statistics, advantages; equal on every rank.

Everything goes by id and is decided before any row is balanced or packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from spear_megatron.algorithms.advantages import grpo_advantages, reinforce_plus_plus_advantages, rloo_advantages
from spear_megatron.algorithms.config import AlgorithmConfig
from spear_megatron.algorithms.filters import group_spread, kept_groups, masked_reason
from spear_megatron.algorithms.gigpo import step_advantages, step_returns
from spear_megatron.data.index import IndexRow
from spear_megatron.rewards.compose import RewardRule, base_reward, tool_bonus
from spear_megatron.types import TrajectoryId

GroupId = tuple[int, int]
SegmentKey = tuple[TrajectoryId, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One step, by trajectory id.

    Attributes:
        mu: tool-call coefficient of the step.
        base, bonus: parts of the reward of every valid trajectory, R = base + mu * bonus.
        rewards: R, less a KL penalty where there is one.
        masked: why a trajectory's tokens carry no loss, for those that a filter caught.
        groups: the task groups that are trained on.
        counted: trajectories that enter group statistics.
        advantages: of every valid trajectory in ``groups``, once estimated.
        step_advantages: GiGPO's step term by (trajectory, segment), before its weight.
    """

    mu: float
    base: Mapping[TrajectoryId, float]
    bonus: Mapping[TrajectoryId, float]
    rewards: Mapping[TrajectoryId, float]
    masked: Mapping[TrajectoryId, str]
    groups: frozenset[GroupId]
    counted: frozenset[TrajectoryId]
    advantages: Mapping[TrajectoryId, float] = field(default_factory=dict)
    step_advantages: Mapping[SegmentKey, float] = field(default_factory=dict)

    def trains_on(self, trajectory: TrajectoryId) -> bool:
        """Whether the trajectory is valid and its group is kept."""
        return trajectory in self.rewards and trajectory.group in self.groups


def score(
    index: Sequence[IndexRow], rule: RewardRule, mu: float, config: AlgorithmConfig, *, ratio: float, kind: str
) -> Scores:
    """Rewards and filters of a step.

    Args:
        index: every trajectory of the step.
        ratio, kind: ``rollout_filter_ratio`` and ``rollout_filter_type``.
    """
    valid = [row for row in index if row.valid]
    base = {row.id: base_reward(row.reward, rule) for row in valid}
    bonus = {row.id: tool_bonus(row.reward, rule) for row in valid}
    rewards = {key: base[key] + mu * bonus[key] for key in base}
    reasons = {row.id: _reason(row, config) for row in valid}
    masked = {key: reason for key, reason in reasons.items() if reason is not None}
    counted = frozenset(key for key in rewards if config.filtered_in_statistics or key not in masked)
    groups = {key.group for key in rewards}
    if ratio < 1.0 and groups:
        spread = dict.fromkeys(groups, 0.0) | group_spread({key: rewards[key] for key in counted})
        groups = kept_groups(spread, ratio, kind)
    return Scores(
        mu=mu, base=base, bonus=bonus, rewards=rewards, masked=masked, groups=frozenset(groups), counted=counted
    )


def _reason(row: IndexRow, config: AlgorithmConfig) -> str | None:
    return masked_reason(
        row.stop_reason,
        row.flags,
        overlong=config.filter_overlong_responses,
        incomplete=config.filter_incomplete_responses,
        repetitive=config.filter_repetitive_responses,
        unreadable=config.filter_unreadable_responses,
    )


def estimate(
    scores: Scores, index: Sequence[IndexRow], config: AlgorithmConfig, *, invalid_action_penalty: float
) -> Scores:
    """Scores with the advantages of ``config.adv_estimator``.

    Args:
        invalid_action_penalty: what the step rewards of GiGPO lose per invalid action.
    """
    rows = {row.id: row for row in index if scores.trains_on(row.id)}
    ids = sorted(rows)
    rewards = torch.tensor([scores.rewards[key] for key in ids], dtype=torch.float64)
    counted = torch.tensor([key in scores.counted for key in ids], dtype=torch.bool)
    groups = [key.group for key in ids]
    if config.adv_estimator == "rloo":
        advantages = rloo_advantages(rewards, groups, counted, singleton=config.singleton_advantage)
    elif config.adv_estimator == "reinforce_plus_plus":
        tokens = [0 if key in scores.masked else sum(rows[key].sampled_lengths) for key in ids]
        advantages = reinforce_plus_plus_advantages(rewards, tokens, counted)
    else:
        by_std = (
            config.gigpo.mode == "mean_std_norm" if config.adv_estimator == "gigpo" else config.norm_adv_by_std_in_grpo
        )
        advantages = grpo_advantages(
            rewards, groups, counted, norm_by_std=by_std, singleton=config.singleton_advantage
        )
    steps: dict[SegmentKey, float] = {}
    if config.adv_estimator == "gigpo":
        members = [rows[key] for key in ids if key in scores.counted]
        steps = _step_term(members, config, invalid_action_penalty)
    return replace(scores, advantages=dict(zip(ids, advantages.tolist(), strict=True)), step_advantages=steps)


def _step_term(
    rows: Sequence[IndexRow], config: AlgorithmConfig, invalid_action_penalty: float
) -> dict[SegmentKey, float]:
    """GiGPO (arXiv 2505.10978), section 4.2: returns compared among equal observations of one task group."""
    keys: list[SegmentKey] = []
    returns: list[float] = []
    anchors: list[tuple[GroupId, int]] = []
    for row in rows:
        own = [
            reward - invalid_action_penalty * invalid
            for reward, invalid in zip(row.step_rewards, row.step_invalid, strict=True)
        ]
        returns += step_returns(own, config.gamma)
        keys += [(row.id, segment) for segment in range(len(own))]
        anchors += [(row.id.group, anchor) for anchor in row.anchors]
    return dict(zip(keys, step_advantages(returns, anchors, mode=config.gigpo.mode), strict=True))
