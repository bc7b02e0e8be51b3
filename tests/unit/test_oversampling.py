"""Over-sampled collections on one rank: what is accepted, what goes back, and how requests are ended."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.data.prompts import PromptSource
from spear_megatron.rollout.acceptance import (
    AcceptanceLog,
    GroupRecord,
    accept,
    acceptance_metrics,
    from_json,
    read_decisions,
    to_json,
)
from spear_megatron.rollout.engine import (
    AbortableEngine,
    GenerateRequest,
    GenerateResult,
    RequestStopped,
    SamplingParams,
)
from spear_megatron.rollout.oversampling import Drawing, Drawn, Portion, StoppableEngine, draw_groups
from spear_megatron.rollout.partial import EpisodeSlot, PartialEpisode
from spear_megatron.rollout.work import SharedWork
from spear_megatron.types import Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId

RECORDS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 3), st.booleans(), st.booleans()), unique_by=lambda item: item[0]
)


def records_of(items: Sequence[tuple[int, int, bool, bool]]) -> list[GroupRecord]:
    return [
        GroupRecord(task, owner, done, done and failed, ((task + 1, done), (2, done)))
        for task, owner, done, failed in items
    ]


@settings(deadline=None)
@given(items=RECORDS, wanted=st.integers(1, 8), seed=st.randoms())
def test_what_is_accepted_depends_on_the_records_alone(items, wanted, seed) -> None:
    records, candidates = records_of(items), list(range(31))
    one = accept(4, 0, wanted, candidates, records)
    seed.shuffle(records)
    seed.shuffle(candidates)
    again = accept(4, 0, wanted, candidates, records)
    assert one == again and from_json(json.loads(json.dumps(to_json(one)))) == one
    complete = {record.task: record.failed for record in records if record.complete}
    assert list(one.accepted) == sorted(one.accepted) and set(one.accepted) <= complete.keys()
    assert len(one.accepted) == min(wanted, len(complete))
    assert set(one.accepted) | one.dropped.keys() == set(range(31)) and not set(one.accepted) & one.dropped.keys()
    for task, reason in one.dropped.items():
        state = [record.complete for record in records if record.task == task]
        assert reason == {(): "not_started", (True,): "surplus", (False,): "unfinished"}[tuple(state)]
        if reason == "surplus":  # every accepted group comes before it
            assert all((complete[other], other) < (complete[task], task) for other in one.accepted)


def test_a_group_that_was_rolled_out_twice_is_an_error() -> None:
    twice = [GroupRecord(1, 0, True, False, ()), GroupRecord(1, 1, True, False, ())]
    with pytest.raises(ValueError, match="distinct candidates"):
        accept(1, 0, 1, [1, 2], twice)
    with pytest.raises(ValueError, match="distinct candidates"):
        accept(1, 0, 1, [2], twice[:1])


def test_figures_by_length() -> None:
    records = [
        GroupRecord(0, 0, True, False, ((10, True), (30, True))),
        GroupRecord(1, 1, False, False, ((20, True), (90, False))),
        GroupRecord(2, 0, True, False, ((100, True), (0, True))),
    ]
    figures = acceptance_metrics([accept(1, 0, 1, [0, 1, 2, 3], records)], 100)
    assert figures["oversampling/groups_started"] == 3 and figures["oversampling/groups_complete"] == 2
    assert figures["oversampling/groups_unfinished"] == 1 and figures["oversampling/groups_surplus"] == 1
    assert figures["oversampling/prompts_returned"] == 3
    assert figures["oversampling/response_length_started"] == pytest.approx(250 / 6)
    assert figures["oversampling/response_length_accepted"] == pytest.approx(20)
    assert figures["oversampling/tokens_dropped"] == pytest.approx(210 / 250)
    shares = {name[-2:]: value for name, value in figures.items() if "finished_share" in name}
    assert shares == {"q1": 1.0, "q2": 1.0, "q4": 0.5}
    assert acceptance_metrics([], 100) == {}


def test_the_log_repeats_only_the_same_collection(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.jsonl"
    log, decision = AcceptanceLog((), path), accept(3, 0, 1, [5, 6], [GroupRecord(6, 1, True, False, ((4, True),))])
    assert log.find(3, 0, 1, [5, 6]) is None
    log.write(decision)
    with open(path, "a") as stream:
        stream.write('{"step": 4, "ba')  # the process died while it wrote
    lines = read_decisions(path)
    again = AcceptanceLog(lines, path)
    assert again.find(3, 0, 1, [6, 5]) == decision and decision.owners == {6: 1}
    assert again.find(3, 1, 1, [5, 6]) is None and again.find(3, 0, 2, [5, 6]) is None
    assert again.find(3, 0, 1, [5, 7]) is None
    assert len(lines) == 1 and read_decisions(tmp_path / "none") == []
    again.write(accept(4, 0, 1, [7], []))
    again.write(accept(5, 0, 1, [8], []))
    assert [line["step"] for line in read_decisions(path)] == [3, 4, 5]
    AcceptanceLog((), tmp_path / "new" / "log").write(decision)
    assert read_decisions(tmp_path / "new" / "log") == lines
    path.write_text("{\n{}\n")
    with pytest.raises(ValueError, match="acceptance.jsonl is damaged"):
        read_decisions(path)
    with pytest.raises(ValueError, match="were accepted"):
        AcceptanceLog([{**lines[0], "accepted": [5]}])
    with pytest.raises(ValueError, match="not a decision: KeyError"):
        AcceptanceLog([{"step": 1}])


def source(size: int = 5) -> PromptSource:
    prompts = [Prompt(f"t{i}", ({"role": "user", "content": str(i)},)) for i in range(size)]
    return PromptSource(prompts, seed=3, shuffle=True)


@settings(deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 7), st.randoms()), max_size=8))
def test_no_prompt_is_lost_or_doubled_and_the_queue_survives_a_restart(steps) -> None:
    plain, queue, kept = source(), source(), []
    for count, random in steps:
        drawn = queue.draw(count)
        assert [index for index, _ in drawn] == sorted({index for index, _ in drawn})
        back = [index for index, _ in drawn if random.random() < 0.5]
        kept += [(index, prompt) for index, prompt in drawn if index not in back]
        queue.give_back(back)
        resumed = source()
        resumed.load_state_dict(json.loads(json.dumps(queue.state_dict())))
        queue = resumed
    waiting = queue.draw(len(queue.state_dict()["returned"]))
    everything = sorted([*kept, *waiting], key=lambda pair: pair[0])
    assert everything == list(enumerate(plain.take(queue.position)))


def test_without_anything_given_back_draw_is_take() -> None:
    one, other = source(), source()
    assert [prompt for _, prompt in one.draw(7)] == other.take(7) and one.state_dict() == other.state_dict()
    for bad in ([7], [-1], [2, 2]):
        with pytest.raises(ValueError, match="different ones of the 7 drawn"):
            one.give_back(bad)


def trajectory(key: TrajectoryId, tokens: int, failed: bool = False) -> Trajectory:
    mask = torch.arange(tokens + 1) > 0
    segment = Segment(torch.arange(tokens + 1, dtype=torch.int32), mask, -mask.float())
    stop = StopReason.INFRASTRUCTURE if failed else StopReason.ANSWER
    return Trajectory(key, (segment,), RewardParts(1.0), stop, 0, error="burned" if failed else None)


class Fixed:
    """Stands for an episode that has sampled so many tokens and cannot go on."""

    def __init__(self, num_sampled: int) -> None:
        self.num_sampled = num_sampled

    def partial(self) -> PartialEpisode | None:
        return None


def drawn(lengths: Sequence[float], *, wanted: int, failing: Sequence[int] = (), concurrency: int = 64,
          work: SharedWork | None = None) -> Drawn:
    """Groups of two whose second member takes ``lengths[task]`` hundredths of a second, and so many tokens."""

    async def run(prompt: Prompt, key: TrajectoryId, slot: EpisodeSlot) -> Trajectory:
        slot.bind(Fixed(7))
        if key.sample == 1:
            await asyncio.sleep(lengths[key.task] / 100)
        return trajectory(key, int(lengths[key.task]) + 1, key.task in failing)

    async def stop() -> None:
        return None

    drawing = Drawing(
        step=2, num_samples=2, run=run, stop=stop, owner=0, max_concurrency=concurrency, deadline_s=5.0
    )
    candidates = [(index, Prompt(str(index), ())) for index in range(len(lengths))]
    work = work or SharedWork(dist.HashStore(), "test")
    return asyncio.run(draw_groups(drawing, Portion(work, wanted, candidates)))


def test_a_leader_stops_when_enough_groups_are_complete() -> None:
    result = drawn([1, 400, 2, 400], wanted=2)
    assert sorted(result.groups) == [0, 2]
    by_task = {record.task: record for record in result.records}
    assert by_task[0] == GroupRecord(0, 0, True, False, ((2, True), (2, True)), born=2, lost=2)
    assert by_task[1] == GroupRecord(1, 0, False, False, ((401, True), (7, False)), born=2, lost=2)
    assert accept(2, 0, 2, range(4), result.records).dropped == {1: "unfinished", 3: "unfinished"}


def test_groups_wait_for_room_and_failed_ones_do_not_count() -> None:
    result = drawn([1, 1, 1, 1, 1], wanted=2, failing=(0,), concurrency=2)
    assert [record.task for record in result.records] == [0, 1, 2]
    decision = accept(2, 0, 2, range(5), result.records)
    assert decision.accepted == (1, 2) and decision.dropped == {0: "surplus", 3: "not_started", 4: "not_started"}
    few = drawn([1, 1], wanted=2, failing=(0,))
    assert accept(2, 0, 2, range(2), few.records).accepted == (0, 1)
    assert few.error == "burned" and drawn([1, 1], wanted=2).error is None


def test_a_failed_group_is_passed_over_while_others_are_sound_or_were_stopped() -> None:
    work = SharedWork(dist.HashStore(), "test")
    work.complete()  # another leader's sound group
    assert sorted(drawn([1, 1], wanted=3, failing=(0, 1), work=work).groups) == [0, 1]
    later = SharedWork(dist.HashStore(), "test")
    threading.Timer(0.2, later.complete).start()
    result = drawn([1, 400], wanted=1, failing=(0,), work=later)
    assert sorted(result.groups) == [0] and [record.complete for record in result.records] == [True, False]


def test_late_groups_are_named_and_errors_of_the_settings_pass_through() -> None:
    async def stop() -> None:
        return None

    async def hang(prompt: Prompt, key: TrajectoryId, slot: EpisodeSlot) -> Trajectory:
        await asyncio.sleep(60)
        raise AssertionError

    async def refuse(prompt: Prompt, key: TrajectoryId, slot: EpisodeSlot) -> Trajectory:
        raise ValueError("the prompt is too long")

    for run, error, text in ((hang, TimeoutError, "0 of 1 groups .* 2-4"), (refuse, ValueError, "too long")):
        drawing = Drawing(
            step=2, num_samples=2, run=run, stop=stop, owner=0, max_concurrency=4, deadline_s=0.1
        )
        portion = Portion(SharedWork(dist.HashStore(), "test"), 1, [(4, Prompt("4", ()))])
        with pytest.raises(error, match=text):
            asyncio.run(draw_groups(drawing, portion))


class Waiting:
    """An engine whose requests end only when they are aborted, after three tokens."""

    def __init__(self) -> None:
        self.futures: dict[str, asyncio.Future[GenerateResult]] = {}

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        return await self.futures.setdefault(request.request_id, asyncio.get_running_loop().create_future())

    async def abort(self, request_ids) -> None:
        for name in request_ids:
            self.futures[name].set_result(GenerateResult((1, 2, 3), (-1.0,) * 3, "abort"))

    def update_weights(self, named_tensors, version) -> None:
        raise AssertionError

    async def close(self) -> None:
        raise AssertionError


def test_stopping_ends_requests_and_hands_over_their_tokens() -> None:
    async def play() -> list[BaseException | GenerateResult]:
        assert isinstance(Waiting(), AbortableEngine)
        engine = StoppableEngine(Waiting())
        requests = [GenerateRequest(f"2-0-{i}/0/0", (1,), SamplingParams(8), i) for i in range(2)]
        calls = [asyncio.create_task(engine.generate(request)) for request in requests]
        await asyncio.sleep(0)
        await engine.stop()
        return await asyncio.gather(*calls, engine.generate(requests[0]), return_exceptions=True)

    stopped = asyncio.run(play())
    assert all(isinstance(item, RequestStopped) for item in stopped)
    assert [item.result.output_ids for item in stopped] == [(1, 2, 3), (1, 2, 3), ()]
