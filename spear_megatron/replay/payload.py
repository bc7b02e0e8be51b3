"""A whole trajectory as one record, unpadded, and back as the rows that are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from spear_megatron.algorithms.mismatch import num_turns
from spear_megatron.data.exchange import TensorRecord
from spear_megatron.types import Row, Trajectory, TrajectoryId

BYTES_PER_TOKEN = 4 + 1 + 4 + 4 + 4
"""ids, response mask, two log-probs, policy version."""
BYTES_PER_RECORD = 600
"""Header, digest, names and fields of one record, about."""


def make_payload(
    trajectory: Trajectory, old_log_probs: Sequence[torch.Tensor], step_advantages: Sequence[float], temperature: float
) -> TensorRecord:
    """One record of all segments, concatenated.

    Args:
        old_log_probs: float32 [n] per segment, the trainer's before the update of the trajectory's own step.
        step_advantages: GiGPO's step term per segment, 0 without.
        temperature: of sampling.

    Raises:
        ValueError: the log-probs do not fit the segments.
    """
    segments = trajectory.segments
    if [len(value) for value in old_log_probs] != [len(segment.ids) for segment in segments]:
        raise ValueError(f"trajectory {trajectory.id} needs one old log-prob per token of each of its segments")
    unknown = torch.full((1,), -1, dtype=torch.int32)
    versions = [
        segment.policy_versions if segment.policy_versions is not None else unknown.expand(len(segment.ids))
        for segment in segments
    ]
    return TensorRecord(
        tensors={
            "ids": torch.cat([segment.ids for segment in segments]),
            "response_mask": torch.cat([segment.response_mask for segment in segments]),
            "rollout_log_probs": torch.cat([segment.rollout_log_probs for segment in segments]),
            "old_log_probs": torch.cat([value.float() for value in old_log_probs]),
            "policy_versions": torch.cat(versions).to(torch.int32),
        },
        fields={
            "id": list(trajectory.id),
            "lengths": [len(segment.ids) for segment in segments],
            "observation_keys": [segment.observation_key for segment in segments],
            "step_advantages": [float(value) for value in step_advantages],
            "temperature": float(temperature),
        },
    )


def payload_id(record: TensorRecord) -> TrajectoryId:
    """Whose record it is."""
    return TrajectoryId(*record.fields["id"])


def replay_rows(
    record: TensorRecord, advantages: Mapping[TrajectoryId, float], *, step_term_weight: float
) -> list[Row]:
    """Rows of a replayed trajectory, one per segment, with the log-probs of when it was sampled.

    Args:
        advantages: recalibrated advantage by trajectory; it takes the place of the episode term.
        step_term_weight: of the stored step term; 0 drops it.
    """
    trajectory = payload_id(record)
    lengths = record.fields["lengths"]
    parts = {name: tensor.split(lengths) for name, tensor in record.tensors.items()}
    rows = []
    for segment, step_term in enumerate(record.fields["step_advantages"]):
        mask = parts["response_mask"][segment]
        advantage = advantages[trajectory] + step_term_weight * step_term
        rows.append(
            Row(
                trajectory=trajectory,
                segment=segment,
                ids=parts["ids"][segment],
                response_mask=mask,
                rollout_log_probs=parts["rollout_log_probs"][segment],
                advantages=mask.float() * advantage,
                old_log_probs=parts["old_log_probs"][segment],
                policy_versions=parts["policy_versions"][segment],
                first_turn=1 + sum(num_turns(earlier) for earlier in parts["response_mask"][:segment]),
            )
        )
    return rows
