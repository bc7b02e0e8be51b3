"""A stored trajectory comes back as the rows it was, with recalibrated advantages and the log-probs of its own step."""

from __future__ import annotations

import pytest
import torch

from spear_megatron.data.exchange import decode_records, encode_records
from spear_megatron.replay.payload import make_payload, payload_id, replay_rows
from spear_megatron.types import RewardParts, Segment, StopReason, Trajectory, TrajectoryId

ID = TrajectoryId(3, 5, 7)


def trajectory() -> Trajectory:
    segments = []
    for length in (5, 4):
        mask = torch.arange(length) >= 2
        versions = torch.where(mask, 2, -1).int() if length == 5 else None
        segments.append(
            Segment(
                torch.arange(length, dtype=torch.int32) + 10 * length, mask, -torch.rand(length) * mask,
                observation_key=f"room {length}", policy_versions=versions,
            )
        )  # fmt: skip
    return Trajectory(ID, tuple(segments), RewardParts(1.0, success=True), StopReason.ANSWER, 2)


def test_rows_come_back_exactly_with_the_step_term_at_its_weight() -> None:
    made = trajectory()
    old = [-torch.rand(len(segment.ids)) for segment in made.segments]
    record = decode_records(encode_records([make_payload(made, old, [0.5, -2.0], temperature=0.7)]))[0]
    assert payload_id(record) == ID and record.fields["temperature"] == 0.7
    assert record.fields["observation_keys"] == ["room 5", "room 4"]
    assert record.tensors["policy_versions"].tolist() == [-1, -1, 2, 2, 2, -1, -1, -1, -1]
    for weight in (0.0, 0.25):
        rows = replay_rows(record, {ID: 0.75}, step_term_weight=weight)
        assert [(row.trajectory, row.segment) for row in rows] == [(ID, 0), (ID, 1)]
        for row, segment, log_probs, step in zip(rows, made.segments, old, (0.5, -2.0), strict=True):
            assert torch.equal(row.ids, segment.ids) and torch.equal(row.response_mask, segment.response_mask)
            assert torch.equal(row.rollout_log_probs, segment.rollout_log_probs)
            assert row.old_log_probs is not None and torch.equal(row.old_log_probs, log_probs)
            assert torch.equal(row.advantages, segment.response_mask.float() * (0.75 + weight * step))


def test_log_probs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3-5-7"):
        make_payload(trajectory(), [torch.zeros(5)], [0.0, 0.0], temperature=1.0)
