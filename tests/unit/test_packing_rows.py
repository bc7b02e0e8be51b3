"""Packing: nothing lost, nothing invented, same plan whatever the order, results back where they belong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.data.packing import WeightedRow, pack, packed_length, plan_packing, row_key, unpack
from spear_megatron.data.rows import conversation_row, group_rows, kl_penalties, with_advantages
from spear_megatron.types import (
    Group, Prompt, RewardParts, Row, Segment, StopReason, Trajectory, TrajectoryId,
)  # fmt: skip

lengths = st.lists(st.integers(0, 60), max_size=40)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(60, 200), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(0, 5))
def test_plan_covers_every_row_once_within_the_budget(
    rows: list[int], budget: int, length_multiple: int, count_multiple: int, elsewhere: int
) -> None:
    plan = plan_packing(
        rows,
        max_tokens=budget,
        length_multiple=length_multiple,
        count_multiple=count_multiple,
        reduce_max=lambda count: max(count, elsewhere),
    )
    assert sorted(i for members in plan.bins for i in members) == [i for i, n in enumerate(rows) if n]
    assert len(plan.bins) % count_multiple == 0 and len(plan.bins) >= max(elsewhere, 1)
    assert plan.token_length % length_multiple == 0 and plan.token_length <= budget
    loads = [sum(rows[i] for i in members) for members in plan.bins]
    assert max(loads) <= plan.token_length < max(max(loads), 1) + length_multiple
    # First-fit decreasing leaves at most one micro-batch half empty before rounding up the count.
    half_budget = budget // length_multiple * length_multiple / 2
    assert len(plan.bins) <= max(sum(rows) / half_budget + 1, elsewhere, 1) + count_multiple


def test_a_row_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="ppo_max_token_len_per_gpu"):
        plan_packing([10, 101], max_tokens=100)


def test_micro_batches_are_evenly_filled() -> None:
    plan = plan_packing([50, 50, 50, 40, 10, 10, 10, 10], max_tokens=130)
    assert len(plan.bins) == 2 and plan.token_length <= 120


def make_row(number: int, prompt: int, response: list[bool], trainer: bool = False) -> Row:
    generator = torch.Generator().manual_seed(number)
    n = prompt + len(response)
    mask = torch.tensor([False] * prompt + response)
    noise = torch.randn(4, n, generator=generator)
    return Row(
        trajectory=TrajectoryId(1, number // 2, number % 2),
        segment=0,
        ids=torch.randint(1, 1000, (n,), generator=generator, dtype=torch.int32),
        response_mask=mask,
        rollout_log_probs=noise[0] * mask,
        advantages=noise[1] * mask,
        old_log_probs=noise[2] * mask if trainer else None,
        ref_log_probs=noise[3] * mask if trainer else None,
    )


row_shapes = st.lists(st.tuples(st.integers(1, 6), st.lists(st.booleans(), max_size=10)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(row_shapes, st.integers(16, 64), st.booleans())
def test_packed_tensors_say_the_same_as_the_rows(shapes: list, budget: int, trainer: bool) -> None:
    rows = [make_row(i, prompt, response, trainer) for i, (prompt, response) in enumerate(shapes)]
    weighted = [WeightedRow(row, torch.rand(len(row.ids)) * row.response_mask) for row in rows]
    plan = plan_packing([packed_length(row.response_mask) for row in rows], max_tokens=budget, length_multiple=2)
    batch = pack(weighted, plan)
    by_key = {row_key(item.row): item for item in weighted}
    seen = 0
    for micro_batch in batch.micro_batches:
        offsets = micro_batch.cu_seqlens.tolist()
        assert offsets[0] == 0 and offsets[-1] == len(micro_batch.tokens) == plan.token_length
        assert micro_batch.cu_seqlens.dtype == torch.int32
        for index, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            assert 0 < end - start <= batch.max_seqlen
            assert micro_batch.position_ids[start:end].tolist() == list(range(end - start))
            if index == len(micro_batch.rows):
                assert not micro_batch.loss_mask[start:end].any() and not micro_batch.token_weight[start:end].any()
                continue
            item = by_key[micro_batch.rows[index]]
            row, n = item.row, end - start
            assert torch.equal(micro_batch.tokens[start:end], row.ids[:n].long())
            assert torch.equal(micro_batch.targets[start:end], row.ids[1 : n + 1].long())
            assert torch.equal(micro_batch.loss_mask[start:end], row.response_mask[1 : n + 1])
            assert torch.equal(micro_batch.token_weight[start:end], item.weights[1 : n + 1])
            for name in ("advantages", "old_log_probs", "rollout_log_probs", "ref_log_probs"):
                value = getattr(row, name)
                expected = torch.zeros(n) if value is None else value[1 : n + 1]
                assert torch.equal(getattr(micro_batch, name)[start:end], expected)
            seen += 1
    assert seen == batch.num_rows == sum(bool(row.response_mask[1:].any()) for row in rows)
    assert batch.num_tokens == sum(int(row.response_mask[1:].sum()) for row in rows)
    values = [micro_batch.rollout_log_probs for micro_batch in batch.micro_batches]
    for row, value in zip(rows, unpack(batch, values, rows), strict=True):
        expected = row.rollout_log_probs.clone()
        expected[0] = 0
        assert torch.equal(value, expected)


def test_unpack_clears_what_lies_off_the_mask() -> None:
    row = make_row(3, 2, [True, False, True])
    batch = pack([WeightedRow(row, torch.ones(5))], plan_packing([packed_length(row.response_mask)], max_tokens=8))
    (value,) = unpack(batch, [torch.full((4,), float("nan"))], [row])
    assert value.isnan().tolist() == [False, False, True, False, True]


def make_trajectory(task: int, sample: int, stop: StopReason = StopReason.ANSWER) -> Trajectory:
    mask = torch.tensor([False, True, True])
    segment = Segment(torch.arange(3, dtype=torch.int32), mask, -torch.ones(3) * mask)
    name = TrajectoryId(1, task, sample)
    return Trajectory(name, (segment, segment), RewardParts(outcome=1.0), stop, policy_version=0)


def test_infrastructure_failures_have_no_rows() -> None:
    members = (make_trajectory(0, 0), make_trajectory(0, 1, StopReason.INFRASTRUCTURE))
    rows = group_rows([Group(Prompt("t", ()), members)])
    assert [row_key(row) for row in rows] == [(TrajectoryId(1, 0, 0), 0), (TrajectoryId(1, 0, 0), 1)]
    filled = with_advantages(rows, {TrajectoryId(1, 0, 0): -0.5})
    assert filled[1].advantages.tolist() == [0.0, -0.5, -0.5]


def test_kl_penalties_add_up_over_segments() -> None:
    rows = group_rows([Group(Prompt("t", ()), (make_trajectory(0, 0),))])
    zeros, half = torch.zeros(3), torch.full((3,), 0.5)
    rows = [replace(row, old_log_probs=half, ref_log_probs=zeros) for row in rows]
    assert kl_penalties(rows, kind="k1", coef=0.1) == {TrajectoryId(1, 0, 0): pytest.approx(0.2)}


def test_conversation_row_learns_the_masked_tokens() -> None:
    row = conversation_row(5, torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([False, True, False]))
    assert row.trajectory.task == 5 and packed_length(row.response_mask) == 1


def test_a_first_token_cannot_be_learned() -> None:
    with pytest.raises(ValueError, match="first token"):
        packed_length(torch.tensor([True, False]))
