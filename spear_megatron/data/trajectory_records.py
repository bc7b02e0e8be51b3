"""A whole trajectory as a record of tensors and plain fields, and back: nothing is lost."""

from __future__ import annotations

import dataclasses

import torch

from spear_megatron.data.exchange import TensorRecord
from spear_megatron.types import RewardParts, Segment, StopReason, Trajectory, TrajectoryId

_TENSORS = ("ids", "response_mask", "rollout_log_probs")
_PLAIN = (
    "policy_version", "num_turns", "num_tool_calls", "num_tool_failures", "num_tool_turns", "error",
)  # fmt: skip


def trajectory_to_record(trajectory: Trajectory, *, owner: int) -> TensorRecord:
    """One record of all segments, concatenated; ``owner`` is the data-parallel rank that holds the trajectory."""
    segments = trajectory.segments
    empty = {"ids": torch.int32, "response_mask": torch.bool, "rollout_log_probs": torch.float32}
    tensors = {
        name: torch.cat([getattr(segment, name) for segment in segments] or [torch.empty(0, dtype=empty[name])])
        for name in _TENSORS
    }
    versions = [segment.policy_versions for segment in segments if segment.policy_versions is not None]
    tensors["policy_versions"] = torch.cat([torch.empty(0, dtype=torch.int32), *versions])
    fields = {
        "id": list(trajectory.id),
        "owner": owner,
        "reward": dataclasses.asdict(trajectory.reward),
        "stop_reason": trajectory.stop_reason.value,
        "messages": [dict(message) for message in trajectory.messages],
        "segments": [
            {
                "length": len(segment.ids),
                "has_versions": segment.policy_versions is not None,
                "observation_key": segment.observation_key,
                "reward": segment.reward,
                "num_invalid_actions": segment.num_invalid_actions,
            }
            for segment in segments
        ],
        **{name: getattr(trajectory, name) for name in _PLAIN},
    }
    return TensorRecord(tensors=tensors, fields=fields)


def record_to_trajectory(record: TensorRecord) -> Trajectory:
    """Inverse of :func:`trajectory_to_record`."""
    fields = record.fields
    lengths = [part["length"] for part in fields["segments"]]
    parts = {name: record.tensors[name].split(lengths) for name in _TENSORS}
    known = [part["length"] for part in fields["segments"] if part["has_versions"]]
    versions = iter(record.tensors["policy_versions"].split(known))
    segments = tuple(
        Segment(
            ids=parts["ids"][position],
            response_mask=parts["response_mask"][position],
            rollout_log_probs=parts["rollout_log_probs"][position],
            observation_key=part["observation_key"],
            policy_versions=next(versions) if part["has_versions"] else None,
            reward=part["reward"],
            num_invalid_actions=part["num_invalid_actions"],
        )
        for position, part in enumerate(fields["segments"])
    )
    return Trajectory(
        id=TrajectoryId(*fields["id"]),
        segments=segments,
        reward=RewardParts(**fields["reward"]),
        stop_reason=StopReason(fields["stop_reason"]),
        messages=tuple(fields["messages"]),
        **{name: fields[name] for name in _PLAIN},
    )
