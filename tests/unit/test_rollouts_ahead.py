"""What runs ahead of training: its loop, the collector's begin and end, and its place in a checkpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer_deal import ALONE, one_rank_run

from spear_megatron.algorithms.config import AlgorithmConfig
from spear_megatron.checkpoint.states import encode_state
from spear_megatron.cli.agents import check_engine_for
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.data.exchange import decode_records, encode_records
from spear_megatron.data.index import gather_index
from spear_megatron.data.trajectory_records import record_to_trajectory, trajectory_to_record
from spear_megatron.parallel.errors import RunError
from spear_megatron.rollout.acceptance import AcceptanceLog, GroupRecord, accept, to_json
from spear_megatron.rollout.collect import Collected, Collector, Tasks
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.rollout import collect, loop_thread
from spear_megatron.rollout.loop_thread import LoopThread
from spear_megatron.rollout.oversampling import Drawn, Portion
from spear_megatron.rollout.partial import HeldGroup, PartialEpisode
from spear_megatron.trainer.ahead import Generated, decode_generated, encode_generated, encode_held
from spear_megatron.trainer.run import Run
from spear_megatron.trainer.run_config import TrainerConfig
from spear_megatron.types import Group, Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId

TASKS = Tasks("train", 3, ((7, Prompt("t7", ())),), 2, SamplingParams(4))


def make_trajectory(key: TrajectoryId, tokens: int = 3, **fields: Any) -> Trajectory:
    ids = torch.arange(tokens, dtype=torch.int32)
    segment = Segment(ids, ids > 0, -ids.float() / 3, policy_versions=torch.where(ids > 0, 4, -1).to(torch.int32))
    return Trajectory(key, (segment,), RewardParts(0.1, success=True), StopReason.ANSWER, 4, **fields)


def test_coroutines_share_one_loop_on_one_other_thread() -> None:
    async def where() -> tuple[int, int]:
        return id(asyncio.get_running_loop()), threading.get_ident()

    thread = LoopThread("test")
    one, other = thread.run(where()), thread.submit(where()).result()
    assert one == other and one[1] != threading.get_ident()
    never = thread.submit(asyncio.sleep(3600))
    thread.close()
    thread.close()
    with pytest.raises(CancelledError):
        never.result(timeout=5)
    with pytest.raises(RuntimeError, match="closed"):
        thread.run(where())
    LoopThread("unused").close()


def test_code_that_blocks_the_loop_does_not_block_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_thread, "CLOSE_S", 0.05)
    gate = threading.Event()

    async def block() -> None:
        gate.wait(timeout=30)

    thread = LoopThread("blocked")
    thread.submit(block())
    start = time.monotonic()
    thread.close()
    assert time.monotonic() - start < 10
    gate.set()


def test_closing_goes_on_though_something_blocks_the_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (loop_thread, collect):
        monkeypatch.setattr(module, "CLOSE_S", 0.05)
    gate, closed = threading.Event(), list[str]()
    one, other = collector(gate), collector(gate)

    async def block() -> None:
        gate.wait(timeout=10)

    async def close() -> None:
        closed.append("closed")

    assert isinstance(one._runner, LoopThread)
    blocked = one._runner.submit(block())
    start = time.monotonic()
    one.close(close, close)
    assert time.monotonic() - start < 5 and not closed
    other.close(close, close)
    assert closed == ["closed"] * 2
    assert caplog.text.count("goes on without an answer: nothing came of the thread rollouts within 0.05 s") == 2
    gate.set()
    blocked.result(timeout=5)


def collector(gate: threading.Event, *, fails: bool = False, background: bool = True) -> Collector:
    async def run_groups(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
        while not gate.is_set():
            await asyncio.sleep(0.001)
        if fails:
            raise KeyError("broken")
        ids = range(tasks.num_samples)
        return [Group(p, tuple(make_trajectory(TrajectoryId(tasks.step, i, k)) for k in ids)) for i, p in own]

    return Collector(ALONE, run_groups, leaders=[0], timeout_s=60.0, background=background)


def test_what_was_begun_goes_on_until_it_is_ended() -> None:
    gate = threading.Event()
    one = collector(gate)
    one.begin(TASKS)
    with pytest.raises(RuntimeError, match="no collection under way"):
        one.begin(TASKS)
    gate.set()
    collected = one.end()
    assert [row.id for row in collected.index] == [TrajectoryId(3, 7, 0), TrajectoryId(3, 7, 1)]
    assert collected.seconds > 0
    assert [row.id for row in one.collect(TASKS).index] == [row.id for row in collected.index]
    with pytest.raises(RuntimeError, match="no collection was begun"):
        one.end()
    one.close()
    with pytest.raises(RuntimeError, match="background=True"):
        collector(gate, background=False).begin(TASKS)


def test_a_failure_in_the_background_is_told_at_the_end_and_a_close_stops_what_runs() -> None:
    gate = threading.Event()
    one = collector(gate, fails=True)
    one.begin(TASKS)
    gate.set()
    with pytest.raises(RunError, match="collect/train/3 failed. rank 0: KeyError: 'broken' .test_rollouts_ahead"):
        one.end()
    one.close()
    other = collector(threading.Event())
    other.begin(TASKS)
    other.close()


def equal(one: Any, other: Any) -> bool:
    """Dataclasses with tensors, field by field."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(other) and all(equal(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other and type(one) is type(other)


SEGMENTS = st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.none() | st.text(), st.floats(-3, 3)), max_size=4)


@settings(deadline=None)
@given(
    shapes=SEGMENTS, outcome=st.floats(-9, 9), stop=st.sampled_from(StopReason), error=st.none() | st.text(),
    counts=st.tuples(*[st.integers(0, 9)] * 4),
)  # fmt: skip
def test_a_trajectory_survives_its_record(shapes, outcome, stop, error, counts) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    segments = []
    for length, known, key, reward in shapes:
        mask = torch.rand(length, generator=generator) > 0.5
        versions = torch.randint(-1, 9, (length,), generator=generator, dtype=torch.int32) if known else None
        log_probs = -torch.rand(length, generator=generator)
        segments.append(Segment(torch.arange(length, dtype=torch.int32), mask, log_probs, key, versions, reward, 2))
    whole = Trajectory(
        TrajectoryId(3, 12, 1), tuple(segments), RewardParts(outcome, 2, 0.5, True, 1, 3), stop, 4, *counts[:3],
        ({"role": "user", "content": "\u6570"}, {"role": "tool", "content": "", "name": "x"}), error, counts[3],
    )  # fmt: skip
    (record,) = decode_records(encode_records([trajectory_to_record(whole, owner=1)]))
    assert record.fields["owner"] == 1 and equal(record_to_trajectory(record), whole)


def test_a_step_that_waits_survives_a_checkpoint() -> None:
    groups = [
        Group(Prompt(f"t{task}", ()), tuple(make_trajectory(TrajectoryId(5, task, k), 3 + k) for k in range(2)))
        for task in (10, 11)
    ]
    decision = accept(5, 0, 2, [10, 11, 12], [GroupRecord(task, 0, True, False, ((2, True),)) for task in (10, 11)])
    one = Generated(5, 3, Collected(groups, gather_index(groups, ALONE), (decision,)), {"timing_s/gen_ahead": 1.5})
    state = encode_generated(one, ALONE, temperature=0.7, timeout_s=1.0)
    entry, _ = encode_state("ahead", state)
    again = decode_generated(state, ALONE, lambda index: Prompt(f"t{index}", ()))
    assert entry.path.endswith(".pt") and equal(again.collected.groups, groups)
    assert again.collected.index == one.collected.index and again.collected.acceptances == (decision,)
    assert (again.step, again.version, again.metrics) == (5, 3, {"timing_s/gen_ahead": 1.5})


def drawing_collector(decisions: AcceptanceLog) -> Collector:
    """Collects what it is told to draw, in groups of one."""

    async def run_groups(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
        raise AssertionError

    async def run_drawn(tasks: Tasks, portion: Portion) -> Drawn:
        free = {i: Group(p, (make_trajectory(TrajectoryId(tasks.step, i, 0)),)) for i, p in portion.candidates}
        return Drawn(free, [])

    return Collector(
        ALONE, run_groups, leaders=[0], timeout_s=60.0, run_drawn=run_drawn, decisions=decisions
    )


def test_a_step_that_is_repeated_lets_go_what_its_record_let_expire() -> None:
    ended = ((2, True),)
    records = [
        GroupRecord(7, 0, False, False, ((3, False),), born=2), GroupRecord(9, 0, True, False, ended),
        GroupRecord(8, 0, False, False, ((3, False),), born=4, held=True),
    ]  # fmt: skip
    decision = accept(5, 0, 1, [7, 8, 9, 10], records)
    assert decision.accepted == (9,) and decision.held == {8: 0}
    one = drawing_collector(AcceptanceLog([to_json(decision)]))
    waiting = {task: HeldGroup(born, task, {0: make_trajectory(TrajectoryId(born, task, 0))})
               for task, born in ((7, 2), (8, 4), (20, 4))}  # fmt: skip
    one.hold([(0, group) for group in waiting.values()])
    prompts = tuple((task, Prompt(f"t{task}", ())) for task in (7, 8, 9, 10))
    collected = one.collect(Tasks("train", 5, prompts, 1, SamplingParams(4), wanted=1))
    assert [row.id.task for row in collected.index] == [9]
    assert one.held == [waiting[8], waiting[20]]  # 20 was no candidate
    one.close()


@pytest.mark.parametrize(
    ("temperature", "limit", "ahead", "reason"),
    [(0.7, 8, 1, None), (0.7, 4, 1, None), (1.0, 8, 1, "rollout.temperature was 0.7 and is 1.0: "),
     (0.7, 3, 1, "4 tokens of one segment exceed .* = 3: "), (0.7, 8, 0, "trainer.async=0: ")],
)  # fmt: skip
def test_what_waited_is_taken_up_only_where_it_fits(
    temperature: float, limit: int, ahead: int, reason: str | None
) -> None:
    group = Group(Prompt("t7", ()), tuple(make_trajectory(TrajectoryId(5, 7, k), 3 + k) for k in range(2)))
    partial = PartialEpisode(make_trajectory(TrajectoryId(4, 8, 0), 4), {}, "turn", 2)
    held = HeldGroup(4, 8, {}, {0: partial})
    generated = Generated(5, 3, Collected([group], gather_index([group], ALONE)))
    states = {
        "ahead": encode_generated(generated, ALONE, temperature=0.7, timeout_s=1.0),
        "held": encode_held([held], ALONE, temperature=0.7, timeout_s=1.0),
    }
    back, kept = list[int](), list[Any]()
    prompts = SimpleNamespace(at=lambda index: Prompt(f"t{index}", ()), give_back=back.extend)
    parts: Any = SimpleNamespace(
        parallel=ALONE, imitation=None, prompts=prompts, collector=SimpleNamespace(hold=kept.extend)
    )
    plain, sampling = one_rank_run().settings, SamplingParams(8, temperature=temperature)
    changed = dataclasses.replace(plain, sampling=sampling, max_segment_length=limit, partial_rollout=True)
    run = Run(parts=parts, settings=changed, trainer=TrainerConfig(async_=ahead), algorithm=AlgorithmConfig())
    run._restore_rollouts(states)
    assert (run._ahead is not None) == (reason is None) and back == ([] if reason is None else [7])
    fits = reason is None or not ahead
    assert [(owner, group.task) for owner, group in kept] == ([(0, 8)] if fits else [])
    assert len(run._notes) == (0 if reason is None else 1 if fits else 2)
    for note, what in zip(reversed(run._notes), ("1 groups that were rolled out ahead", "1 groups that were to go on")):
        assert re.search(f"{reason}{what}", note)


def test_an_engine_without_weights_of_its_own_cannot_run_ahead() -> None:
    engine: Any = SimpleNamespace(colocated=True)
    check_engine_for(load(Config), engine)
    ahead = load(Config, None, ["trainer.async=1"])
    check_engine_for(ahead, SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trainer.async=1 .*rollout.name=embedded has no copy .*trainer.async=0"):
        check_engine_for(ahead, engine)
