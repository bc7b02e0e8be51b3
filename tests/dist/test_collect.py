"""Collecting on real ranks: assignment of tasks, one index for all, failures and silence named everywhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
import torch
from harness import RankError, run_ranks

from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import initialize
from spear_megatron.rollout import collect
from spear_megatron.rollout.collect import Collector, Tasks, share_of
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.types import Group, Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId

PROMPTS = tuple((10 + i, Prompt(task_id=f"t{i}", messages=({"role": "user", "content": str(i)},))) for i in range(5))
_PAUSE_S = 0.5
TASKS = Tasks("train", 3, PROMPTS, 2, SamplingParams(max_new_tokens=4))


def _trajectory(trajectory_id: TrajectoryId) -> Trajectory:
    mask = torch.tensor([False, True, True])
    segment = Segment(torch.tensor([1, 2, 3], dtype=torch.int32), mask, mask.float() * -1.0)
    reward = RewardParts(outcome=float(trajectory_id.sample))
    return Trajectory(trajectory_id, (segment,), reward, StopReason.ANSWER, policy_version=2, num_turns=1)


async def _roll_out(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
    await asyncio.sleep(0)
    return [
        Group(prompt, tuple(_trajectory(TrajectoryId(tasks.step, index, k)) for k in range(tasks.num_samples)))
        for index, prompt in own
    ]


async def _fail(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
    raise RuntimeError("the sandbox burned down")


async def _broken_code(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
    raise KeyError("observation")


async def _pause(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
    await asyncio.sleep(_PAUSE_S)
    return await _roll_out(tasks, own)


async def _late(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
    try:
        await asyncio.sleep(0.5)
    finally:
        await asyncio.sleep(0.5)  # cancelling episodes takes time as well
    raise TimeoutError("1 of 8 episodes did not finish within 0.5 s: 3-10-0")


async def _silent(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
    await asyncio.sleep(3)
    return []


def _collect(tp: int, failing_rank: int | None = None) -> tuple[list[tuple[int, int]], list[TrajectoryId], list[int]]:
    parallel = initialize(tp, 1)
    try:
        run_groups = _fail if parallel.rank == failing_rank else _roll_out
        leaders = list(range(0, parallel.world_size, tp))
        collector = Collector(parallel, run_groups if parallel.is_leader else None, leaders=leaders, timeout_s=20.0)
        collected = collector.collect(TASKS)
        collector.close()
        owners = [row.owner for row in collected.index]
        return [group.id for group in collected.groups], [row.id for row in collected.index], owners
    finally:
        parallel.destroy()


def _wait_for_silent_leader() -> str:
    parallel = initialize(2, 1)
    try:
        run_groups = _silent if parallel.is_leader else None
        collector = Collector(parallel, run_groups, leaders=[0], timeout_s=0.5, grace_s=0.0)
        try:
            collector.collect(TASKS)
        except (TimeoutError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"
    finally:
        parallel.destroy()


def _collect_with(roll_out: str, timeout_s: float) -> str:
    parallel = initialize(2, 1)
    try:
        run_groups = {"broken code": _broken_code, "late": _late}[roll_out]
        collector = Collector(parallel, run_groups if parallel.is_leader else None, leaders=[0], timeout_s=timeout_s)
        with pytest.raises(RunError) as failure:
            collector.collect(TASKS)
        collector.close()
        return str(failure.value)
    finally:
        parallel.destroy()


def _collect_twice() -> list[bool]:
    parallel = initialize(2, 1)
    try:
        waited = []
        for _ in range(2):
            collector = Collector(parallel, _pause if parallel.is_leader else None, leaders=[0], timeout_s=20.0)
            start = time.monotonic()
            wait_for_leaders = collect.wait_for_leaders
            with pytest.MonkeyPatch.context() as patch:
                left_at = []
                patch.setattr(
                    collect,
                    "wait_for_leaders",
                    lambda *args: (wait_for_leaders(*args), left_at.append(time.monotonic())),
                )
                collector.collect(TASKS)
            collector.close()
            waited.append(left_at[0] - start >= _PAUSE_S)
        return waited
    finally:
        parallel.destroy()


def test_every_task_has_one_leader_whatever_the_number_of_ranks() -> None:
    for dp_size in (1, 2, 3, 4, 7):
        shares = [share_of(PROMPTS, 3, rank, dp_size) for rank in range(dp_size)]
        assert sorted(index for share in shares for index, _ in share) == [index for index, _ in PROMPTS]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_index_is_the_same_on_all_ranks_and_layouts() -> None:
    (one,) = run_ranks(_collect, 1, 1)
    data_parallel = run_ranks(_collect, 2, 1)
    tensor_parallel = run_ranks(_collect, 2, 2)
    expected = [TrajectoryId(3, 10 + task, sample) for task in range(5) for sample in range(2)]
    for result in (one, *data_parallel, *tensor_parallel):
        assert result[1] == expected
    assert data_parallel[0][2] == data_parallel[1][2] and set(data_parallel[0][2]) == {0, 1}
    assert sorted(data_parallel[0][0] + data_parallel[1][0]) == one[0]
    assert tensor_parallel[0][0] == one[0] and tensor_parallel[1][0] == []


def test_one_leaders_failure_stops_every_rank_with_its_message() -> None:
    with pytest.raises(RankError) as failure:
        run_ranks(_collect, 2, 1, 1)
    text = str(failure.value)
    assert text.count("collect/train/3 failed. rank 1: RuntimeError: the sandbox burned down") >= 2


@pytest.mark.slow
def test_an_error_of_any_kind_stops_every_rank_and_names_its_place() -> None:
    for message in run_ranks(_collect_with, 2, "broken code", 20.0):
        assert "collect/train/3 failed. rank 0: KeyError: 'observation' (test_collect.py:" in message


def test_ranks_that_wait_let_a_late_leader_say_what_is_unfinished() -> None:
    for message in run_ranks(_collect_with, 2, "late", 0.5):
        assert "1 of 8 episodes did not finish within 0.5 s: 3-10-0" in message


def test_the_same_tasks_may_be_collected_again() -> None:
    assert run_ranks(_collect_twice, 2) == [[True, True], [True, True]]


@pytest.mark.slow
def test_a_silent_leader_is_named_within_the_deadline() -> None:
    messages = run_ranks(_wait_for_silent_leader, 2)
    assert "waited" in messages[1] and "phase 'collect/train/3' for rank 0" in messages[1]
