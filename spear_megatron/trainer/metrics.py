"""Metrics of one step's rollouts, computed from the index that every rank holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from spear_megatron.data.index import IndexRow
from spear_megatron.types import StopReason, TrajectoryId


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}/mean": sum(values) / len(values), f"{name}/min": min(values), f"{name}/max": max(values)}


def rollout_metrics(
    index: Sequence[IndexRow],
    rewards: Mapping[TrajectoryId, float],
    advantages: Mapping[TrajectoryId, float],
    max_response_length: int,
) -> dict[str, float]:
    """Reward, success, length, turn and tool figures of a step.

    Args:
        index: every trajectory of the step. Infrastructure failures count only under ``stop/infrastructure``.
        rewards: composed reward per valid trajectory.
        advantages: scalar advantage per valid trajectory.
        max_response_length: the response budget in tokens, for the share of clipped responses.
    """
    valid = [row for row in index if row.valid]
    count = max(len(valid), 1)
    lengths = [float(sum(row.response_lengths)) for row in valid]
    metrics = {
        **_spread("critic/rewards", [rewards[row.id] for row in valid]),
        **_spread("critic/advantages", [advantages[row.id] for row in valid]),
        **_spread("response_length", lengths),
        "critic/score/mean": sum(row.reward.outcome for row in valid) / count,
        "success/mean": sum(row.reward.success for row in valid) / count,
        "response_length/clip_ratio": sum(length >= max_response_length for length in lengths) / count,
        "prompt_length/mean": sum(row.prompt_length for row in valid) / count,
        "num_turns/mean": sum(row.num_turns for row in valid) / count,
        "num_turns/max": float(max((row.num_turns for row in valid), default=0)),
        "tools/calls_mean": sum(row.num_tool_calls for row in valid) / count,
        "tools/failures_mean": sum(row.num_tool_failures for row in valid) / count,
        "groups/zero_variance": zero_variance_share(valid, rewards),
    }
    for reason in StopReason:
        metrics[f"stop/{reason.value}"] = sum(row.stop_reason is reason for row in index) / max(len(index), 1)
    return metrics


def zero_variance_share(valid: Sequence[IndexRow], rewards: Mapping[TrajectoryId, float]) -> float:
    """Share of task groups whose rewards are all equal: they carry no learning signal."""
    groups: dict[tuple[int, int], set[float]] = defaultdict(set)
    for row in valid:
        groups[row.id.group].add(rewards[row.id])
    return sum(len(values) == 1 for values in groups.values()) / max(len(groups), 1)
