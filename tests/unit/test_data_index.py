"""Index rows: what decisions read of a trajectory, per segment, and flags of the policy's own tokens and text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from spear_megatron.data.index import index_row
from spear_megatron.types import RewardParts, Segment, StopReason, Trajectory, TrajectoryId


def segment(ids: Sequence[int], mask: Sequence[int], *, key: str | None = None, reward: float = 0.0,
            invalid: int = 0) -> Segment:
    return Segment(
        ids=torch.tensor(ids, dtype=torch.int32),
        response_mask=torch.tensor(mask, dtype=torch.bool),
        rollout_log_probs=torch.zeros(len(ids)),
        observation_key=key,
        reward=reward,
        num_invalid_actions=invalid,
    )


def trajectory(*segments: Segment, sample: int = 0, texts: Sequence[tuple[str, str]] = ()) -> Trajectory:
    return Trajectory(
        id=TrajectoryId(4, 2, sample),
        segments=segments,
        reward=RewardParts(1.0),
        stop_reason=StopReason.ANSWER,
        policy_version=3,
        messages=tuple({"role": role, "content": text} for role, text in texts),
    )


def test_figures_per_segment() -> None:
    row = index_row(
        trajectory(
            segment([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 1], reward=0.5, invalid=1),
            segment([1, 2, 3], [0, 1, 1], invalid=2),
        ),
        "task",
        owner=1,
    )
    assert row.segment_lengths == (6, 3) and row.response_lengths == (4, 2) and row.sampled_lengths == (3, 2)
    assert row.step_rewards == (0.5, 0.0) and row.step_invalid == (1, 2)
    assert (row.prompt_length, row.owner, row.task_id, row.flags) == (2, 1, "task", ())


def test_anchors_are_equal_exactly_for_equal_observations() -> None:
    def anchors(*keys: str | None, sample: int = 0) -> tuple[int, ...]:
        row = index_row(trajectory(*(segment([1, 2], [0, 1], key=key) for key in keys), sample=sample), "task", 0)
        return row.anchors

    first, second = anchors("hall", "attic", "hall"), anchors("attic", "cellar", sample=1)
    assert first[0] == first[2] != first[1] and second[0] == first[1] and second[1] not in first
    alone = anchors(None, None), anchors(None, None, sample=1)
    assert len({*alone[0], *alone[1]}) == 4 and anchors(None, None) == alone[0]  # one of its own, always the same
    assert anchors("alone/4-2-0/0")[0] != alone[0][0]
    assert all(0 <= anchor < 2**64 for anchor in (*first, *alone[0]))
    assert len({anchors(f"state {number}")[0] for number in range(500)}) == 500


def test_repetition_is_judged_on_sampled_tokens_of_all_segments() -> None:
    loop = [*range(20)] * 10  # one 20-gram, ten times
    once, often = segment([7, *range(20)], [0] + [1] * 20), segment([7, *loop], [0] + [1] * 200)
    assert index_row(trajectory(often), "t", 0).flags == ("repetitive",)
    assert index_row(trajectory(*[once] * 10), "t", 0).flags == ("repetitive",)
    assert index_row(trajectory(*[once] * 9), "t", 0).flags == ()
    shown = segment([7, *loop, 8], [0] * 201 + [1])  # the same loop in inserted text
    assert index_row(trajectory(shown), "t", 0).flags == ()


def test_readability_is_judged_on_the_models_own_text() -> None:
    plain = segment([1, 2], [0, 1])
    bad = "caf\ufffd"
    assert index_row(trajectory(plain, texts=[("user", "x"), ("assistant", bad)]), "t", 0).flags == ("unreadable",)
    assert index_row(trajectory(plain, texts=[("user", bad), ("tool", bad), ("assistant", "fine")]), "t", 0).flags == ()
