"""Index rows: per-segment figures, anchors of observations, flags of what the policy itself wrote."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from spear_megatron.data.index import index_row
from spear_megatron.trainer.metrics import staleness_metrics
from spear_megatron.types import RewardParts, Segment, StopReason, Trajectory, TrajectoryId


def segment(key: str | None = None, *, tokens: int = 3, ids: list[int] | None = None, mask: list[int] | None = None,
            **fields: float) -> Segment:
    values = torch.arange(tokens, dtype=torch.int32) if ids is None else torch.tensor(ids, dtype=torch.int32)
    own = torch.tensor([False] + [True] * (len(values) - 1)) if mask is None else torch.tensor(mask, dtype=torch.bool)
    return Segment(values, own, torch.zeros(len(values)), observation_key=key, **fields)  # type: ignore[arg-type]


def trajectory(*segments: Segment, sample: int = 0, messages: tuple = ()) -> Trajectory:
    return Trajectory(
        TrajectoryId(1, 2, sample), segments, RewardParts(1.0), StopReason.ANSWER, 0, messages=messages
    )


def test_steps_have_one_entry_per_segment() -> None:
    row = index_row(trajectory(segment(reward=0.5, num_invalid_actions=2), segment("k", reward=-1.0)), "t", 0)
    assert row.step_rewards == (0.5, -1.0) and row.step_invalid == (2, 0) and len(row.anchors) == 2
    assert index_row(trajectory(), "t", 0).anchors == ()


def test_equal_observations_have_equal_anchors_and_segments_without_one_stay_alone() -> None:
    first = trajectory(segment("a"), segment("b"), segment("a"), segment(), segment())
    second = trajectory(segment("b"), segment(), sample=1)
    one, other = index_row(first, "t", 0).anchors, index_row(second, "t", 1).anchors
    assert one[0] == one[2] != one[1] == other[0]
    assert len({*one, *other}) == 5  # a, b, and three segments without a key


def test_anchors_are_the_same_in_every_process_and_a_key_never_looks_like_a_missing_one() -> None:
    assert index_row(trajectory(segment("c3 empty")), "t", 0).anchors == (6062796082822272583,)
    missing = trajectory(segment())
    named = trajectory(segment(f"{missing.id}/0"), segment(f"alone/{missing.id}/0"))
    assert index_row(missing, "t", 0).anchors[0] not in index_row(named, "t", 0).anchors


@pytest.mark.parametrize(
    ("ids", "mask", "flags"),
    [
        ([0] + [7] * 29, [0] + [1] * 29, ("repetitive",)),
        ([0] + [7] * 28, [0] + [1] * 28, ()),
        ([0] + [7] * 60, [0] + [1, 0] * 30, ()),  # every other token is the tool's
        ([7] * 60 + [1], [0] * 60 + [1], ()),
    ],
)
def test_repetition_counts_own_tokens_alone(ids: list[int], mask: list[int], flags: tuple[str, ...]) -> None:
    assert index_row(trajectory(segment(ids=ids, mask=mask)), "t", 0).flags == flags


def test_repetition_is_found_over_segments() -> None:
    steps = [segment(ids=[0, *range(1, 21)]) for _ in range(10)]
    assert index_row(trajectory(*steps), "t", 0).flags == ("repetitive",)
    assert index_row(trajectory(*steps[1:]), "t", 0).flags == ()


def test_unreadable_is_what_the_policy_wrote() -> None:
    bad = {"role": "assistant", "content": "a \ufffd"}
    assert index_row(trajectory(segment(), messages=(bad,)), "t", 0).flags == ("unreadable",)
    others = ({"role": "tool", "content": "\ufffd"}, {"role": "user", "content": "\ufffd"}, {"role": "assistant"})
    assert index_row(trajectory(segment(), messages=others), "t", 0).flags == ()


def with_versions(versions: list[int] | None, mask: list[int]) -> Segment:
    known = None if versions is None else torch.tensor(versions, dtype=torch.int32)
    return dataclasses.replace(segment(ids=list(range(len(mask))), mask=mask), policy_versions=known)


def test_versions_of_sampled_tokens_are_counted_where_all_are_known() -> None:
    one, other = with_versions([-1, 4, -1, 5], [0, 1, 0, 1]), with_versions([-1, 5, 5], [0, 1, 1])
    assert index_row(trajectory(one, other), "t", 0).versions == ((4, 1), (5, 3))
    assert index_row(trajectory(one, with_versions(None, [0, 1])), "t", 0).versions == ()
    assert index_row(trajectory(), "t", 0).versions == ()


def test_staleness_is_counted_by_token_and_mixed_trajectories_by_trajectory() -> None:
    mixed = trajectory(with_versions([-1, 4, 4, 6], [0, 1, 1, 1]))
    fresh = trajectory(with_versions([-1, 6], [0, 1]), sample=1)
    lost = dataclasses.replace(trajectory(with_versions([-1, 0], [0, 1])), stop_reason=StopReason.INFRASTRUCTURE)
    index = [index_row(item, "t", 0) for item in (mixed, fresh, lost, trajectory(segment()))]
    expected = {"staleness/mean": 1.0, "staleness/max": 2.0, "staleness/mixed_trajectories": 0.5}
    assert staleness_metrics(index, 7) == expected
    assert staleness_metrics(index[3:], 7) == {}
