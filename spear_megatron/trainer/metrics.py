"""Metrics of one step's rollouts, computed from the index that every rank holds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from spear_megatron.data.index import IndexRow
from spear_megatron.trainer.scoring import Scores
from spear_megatron.types import StopReason, TrajectoryId

FILTER_REASONS = ("incomplete", "overlong", "repetitive", "unreadable")
_CLIPPED = (StopReason.LENGTH, StopReason.TOOL_OVERFLOW)


def rollout_metrics(index: Sequence[IndexRow], scores: Scores) -> dict[str, float]:
    """Reward, success, length, turn and tool figures of a step.

    Args:
        index: every trajectory of the step. Infrastructure failures count only under ``stop/infrastructure``.
    """
    rewards = scores.rewards
    valid = [row for row in index if row.valid]
    stops = Counter(row.stop_reason for row in index)
    metrics = {f"stop/{reason.value}": stops[reason] / max(len(index), 1) for reason in StopReason}
    metrics["training/num_trajectories"] = float(len(valid))
    metrics["training/num_groups"] = float(len({row.id.group for row in valid}))
    if not valid:
        return metrics
    return metrics | {
        **_spread("critic/rewards", [rewards[row.id] for row in valid]),
        **_spread("critic/advantages", list(scores.advantages.values()) or [0.0]),
        **_spread("critic/score", [row.reward.outcome for row in valid]),
        **_spread("response_length", [float(sum(row.sampled_lengths)) for row in valid]),
        **_spread("prompt_length", [float(row.prompt_length) for row in valid]),
        **_spread("num_turns", [float(row.num_turns) for row in valid]),
        "spear/mu": scores.mu,
        "reward/penalty_mean": _mean([row.reward.penalty for row in valid]),
        "reward/bonus_mean": _mean([scores.mu * scores.bonus[row.id] for row in valid]),
        "reward/outcome_mean": _mean([row.reward.outcome for row in valid]),
        "reward/invalid_mean": _mean([float(row.reward.num_invalid_actions) for row in valid]),
        "success/mean": _mean([float(row.reward.success) for row in valid]),
        "response_length/clip_ratio": _mean([float(row.stop_reason in _CLIPPED) for row in valid]),
        "tools/calls_mean": _mean([float(row.num_tool_calls) for row in valid]),
        "tools/turns_mean": _mean([float(row.reward.num_tool_turns) for row in valid]),
        "tools/failures_mean": _mean([float(row.num_tool_failures) for row in valid]),
        "groups/zero_variance": zero_variance_share(valid, rewards),
    }


def staleness_metrics(index: Sequence[IndexRow], step: int) -> dict[str, float]:
    """How far the trained weights (version ``step`` - 1) are ahead of those that sampled; nothing without versions."""
    known = [row for row in index if row.valid and row.versions]
    tokens = [(step - 1 - version, count) for row in known for version, count in row.versions]
    if not tokens:
        return {}
    return {
        "staleness/mean": sum(age * count for age, count in tokens) / sum(count for _, count in tokens),
        "staleness/max": float(max(age for age, _ in tokens)),
        "staleness/mixed_trajectories": _mean([float(len(row.versions) > 1) for row in known]),
    }


def filter_metrics(index: Sequence[IndexRow], scores: Scores) -> dict[str, float]:
    """Shares of valid trajectories that a filter masked, by reason, and of groups that are not trained on."""
    valid = [row for row in index if row.valid]
    reasons = Counter(scores.masked.values())
    groups = {row.id.group for row in valid}
    metrics = {f"filter/{reason}": reasons[reason] / max(len(valid), 1) for reason in FILTER_REASONS}
    return metrics | {"filter/groups_dropped": (len(groups) - len(scores.groups)) / max(len(groups), 1)}


def throughput_metrics(index: Sequence[IndexRow], timings: Mapping[str, float], world_size: int) -> dict[str, float]:
    """Tokens per second of a step. ``timings`` are the seconds of ``PhaseTimer.take``."""
    total = float(sum(sum(row.segment_lengths) for row in index))
    sampled = float(sum(sum(row.sampled_lengths) for row in index))
    return {
        "perf/total_num_tokens": total,
        "perf/response_tokens": sampled,
        "perf/throughput": total / max(timings["timing_s/step"], 1e-9) / world_size,
        "perf/gen_throughput": sampled / max(timings.get("timing_s/gen", 0.0), 1e-9),
        "perf/update_throughput": total / max(timings.get("timing_s/update_actor", 0.0), 1e-9),
    }


def mean_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several optimizer steps as one: the largest of names ending in max, the mean of all others."""
    names = sorted({name for part in parts for name in part})
    columns = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: max(values) if name.endswith("max") else _mean(values) for name, values in columns.items()}


def replay_token_share(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Replayed tokens among all sampled tokens of a step's updates; nothing without any replayed one."""
    replayed = sum(part.get("replay/tokens", 0.0) for part in updates)
    fresh = sum(part.get("actor/tokens", 0.0) for part in updates)
    return {"replay/token_share": replayed / (replayed + fresh)} if replayed else {}


def zero_variance_share(valid: Sequence[IndexRow], rewards: Mapping[TrajectoryId, float]) -> float:
    """Share of task groups whose rewards are all equal: they carry no learning signal."""
    groups: dict[tuple[int, int], set[float]] = defaultdict(set)
    for row in valid:
        groups[row.id.group].add(rewards[row.id])
    return sum(len(values) == 1 for values in groups.values()) / max(len(groups), 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}/mean": _mean(values), f"{name}/min": min(values), f"{name}/max": max(values)}
