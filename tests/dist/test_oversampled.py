"""Over-sampled collections on real ranks: shared work, one agreement, and the same step again from its record."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import run_ranks

from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import initialize
from spear_megatron.rollout.acceptance import Acceptance, AcceptanceLog, to_json
from spear_megatron.rollout.collect import Collected, Collector, Tasks
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.rollout.oversampling import Drawing, Drawn, Portion, draw_groups
from spear_megatron.rollout.partial import EpisodeSlot
from spear_megatron.rollout.work import SharedWork
from spear_megatron.types import Group, Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId

PROMPTS = tuple((20 + i, Prompt(f"t{i}", ({"role": "user", "content": str(i)},))) for i in range(12))
TASKS = Tasks("train", 5, PROMPTS, 2, SamplingParams(max_new_tokens=4), wanted=8, batch=0)
SLOW = 21  # a group that no collection waits for


async def _no_stop() -> None:
    return None


def _collector(
    parallel: Any, delay_s: float, decisions: AcceptanceLog | None = None, *, broken: bool = False
) -> Collector:
    """Episodes of ``delay_s``, except for the slow group's; ``broken``: infrastructure fails in all of them."""

    async def run(prompt: Prompt, key: TrajectoryId, slot: EpisodeSlot) -> Trajectory:
        await asyncio.sleep(30 if key.task == SLOW else delay_s)
        mask = torch.tensor([False, True, True])
        segment = Segment(torch.tensor([1, 2, 3], dtype=torch.int32), mask, mask.float() * -1.0)
        if broken:
            return Trajectory(key, (segment,), RewardParts(0.0), StopReason.INFRASTRUCTURE, 4, error="no sandbox")
        return Trajectory(key, (segment,), RewardParts(float(key.sample)), StopReason.ANSWER, policy_version=4)

    async def run_groups(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
        raise AssertionError("an over-sampled collection has no tasks of its own")

    async def run_drawn(tasks: Tasks, portion: Portion) -> Drawn:
        if delay_s < 0:
            raise KeyError("engine")
        drawing = Drawing(
            step=tasks.step, num_samples=tasks.num_samples, run=run, stop=_no_stop, owner=parallel.dp_rank,
            max_concurrency=4, deadline_s=20.0,
        )  # fmt: skip
        return await draw_groups(drawing, portion)

    leads = parallel.is_leader
    return Collector(
        parallel, run_groups if leads else None, leaders=list(range(0, parallel.world_size, parallel.tp_size)),
        timeout_s=20.0, run_drawn=run_drawn if leads else None, decisions=decisions,
    )  # fmt: skip


def _seen(collected: Collected) -> dict[str, Any]:
    (decision,) = collected.acceptances
    return {
        "accepted": decision.accepted,
        "dropped": dict(decision.dropped),
        "index": [row.id for row in collected.index],
        "owners": {row.id.task: row.owner for row in collected.index},
        "own": [group.id[1] for group in collected.groups],
        "line": to_json(decision),
    }


def collect_over_sampled(tp: int) -> list[dict[str, Any]]:
    """The same collection twice, so that counters are forgotten in between, and once more from the first record."""
    parallel = initialize(tp, 1)
    try:
        delay_s = 0.01 if parallel.dp_rank == 0 else 30.0
        first, second = (_collector(parallel, delay_s) for _ in range(2))
        seen = [_seen(collector.collect(TASKS)) for collector in (first, second)]
        repeat = _collector(parallel, 0.0, AcceptanceLog([seen[0]["line"]]))
        seen.append(_seen(repeat.collect(TASKS)))
        for collector in (first, second, repeat):
            collector.close()
        return seen
    finally:
        parallel.destroy()


class FullDisk(AcceptanceLog):
    """Cannot be written on rank 0."""

    def write(self, acceptance: Acceptance) -> None:
        if int(os.environ["RANK"]) == 0:
            raise OSError("no space left")


def collect_on_a_full_disk() -> str:
    """What this rank says of a decision that rank 0 cannot record."""
    parallel = initialize(1, 1)
    try:
        collector = _collector(parallel, 0.01, FullDisk())
        with pytest.raises(RunError) as failure:
            collector.collect(TASKS)
        collector.close()
        return str(failure.value)
    finally:
        parallel.destroy()


def collect_with_a_broken_leader() -> str:
    """What this rank says when the second leader cannot roll out anything."""
    parallel = initialize(1, 1)
    try:
        collector = _collector(parallel, 0.01 if parallel.rank == 0 else -1.0)
        with pytest.raises(RunError) as failure:
            collector.collect(TASKS)
        collector.close()
        return str(failure.value)
    finally:
        parallel.destroy()


def collect_with_broken_infrastructure() -> tuple[list[int], str]:
    """Tasks that this rank sees as sound when the first leader fails in all of its groups at once, and what it says
    when both do."""
    parallel = initialize(1, 1)
    try:
        first = parallel.rank == 0
        tasks = Tasks("train", 5, PROMPTS[2:], 2, SamplingParams(max_new_tokens=4), wanted=8, batch=0)
        collector = _collector(parallel, 0.01 if first else 1.0, broken=first)
        sound = sorted({row.id.task for row in collector.collect(tasks).index if row.valid})
        collector.close()
        collector = _collector(parallel, 0.01, broken=True)
        with pytest.raises(RunError) as failure:
            collector.collect(tasks)
        collector.close()
        return sound, str(failure.value)
    finally:
        parallel.destroy()


def count_work() -> tuple[list[int], int]:
    """Numbers that this rank draws of 40, and the count of both ranks."""
    parallel = initialize(1, 1)
    try:
        work = SharedWork(parallel.store, "work/test")
        mine = []
        while (number := work.draw()) < 40:
            mine.append(number)
            work.complete()
        while work.num_complete < 40:
            pass
        return mine, work.num_complete
    finally:
        parallel.destroy()


def test_two_leaders_share_the_work_and_the_count() -> None:
    (one, total), (other, same) = run_ranks(count_work, 2)
    assert sorted(one + other) == list(range(40)) and total == same == 40


def test_all_ranks_accept_the_same_groups_and_a_fast_leader_does_the_work_of_a_slow_one() -> None:
    ranks = run_ranks(collect_over_sampled, 2, 1)
    for attempt in range(3):
        one, other = (rank[attempt] for rank in ranks)
        assert {key: one[key] for key in one if key != "own"} == {key: other[key] for key in other if key != "own"}
        assert one["accepted"] == tuple(sorted(one["own"] + other["own"])) and len(one["accepted"]) == 8
        assert SLOW in one["dropped"] and one["dropped"].keys() | set(one["accepted"]) == {i for i, _ in PROMPTS}
        assert one["index"] == [TrajectoryId(5, task, sample) for task in one["accepted"] for sample in range(2)]
    assert len(ranks[0][0]["own"]) == 8 and ranks[1][0]["own"] == []  # the other leader is still at its first ones
    first, repeated = ranks[0][0], ranks[0][2]
    assert repeated == first


def test_a_decision_that_cannot_be_recorded_stops_every_rank() -> None:
    for message in run_ranks(collect_on_a_full_disk, 2):
        assert message == "recording of collect/train/5 failed. rank 0: no space left"


def test_one_leaders_failure_stops_every_rank() -> None:
    for message in run_ranks(collect_with_a_broken_leader, 2):
        assert message.startswith("collect/train/5 failed. rank 1: KeyError: 'engine' (test_oversampled.py:")


def test_ranks_that_do_not_lead_know_the_decision() -> None:
    leader, follower = run_ranks(collect_over_sampled, 2, 2)
    for one, other in zip(leader, follower, strict=True):
        assert other["own"] == [] and {**one, "own": []} == other and len(one["own"]) == 8


def test_a_leader_without_a_sound_group_waits_for_the_others() -> None:
    (sound, text), (same, also) = run_ranks(collect_with_broken_infrastructure, 2)
    assert sound and sound == same
    assert text == also and "infrastructure failed in all 10 groups of all ranks, first: no sandbox" in text
