"""A leader's part of an over-sampled collection: draw groups from the shared work until enough are complete, then stop.

Which of them make up the step is not decided here but by all ranks together, from the records of every leader
(``rollout.acceptance``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from spear_megatron.rollout.acceptance import GroupRecord
from spear_megatron.rollout.engine import AbortableEngine, Engine, GenerateRequest, GenerateResult, RequestStopped
from spear_megatron.rollout.partial import EpisodeSlot, HeldGroup, num_sampled
from spear_megatron.rollout.work import SharedWork
from spear_megatron.types import Group, Prompt, Trajectory, TrajectoryId

POLL_S = 0.02
ABORT_GRACE_S = 5.0
_MAX_NAMED = 10

RunEpisode = Callable[[Prompt, TrajectoryId, EpisodeSlot], Awaitable[Trajectory]]


class StoppableEngine:
    """Passes requests on to an engine and can end all of them at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending: set[str] = set()
        self._stopped = False

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """As the engine.

        Raises:
            RequestStopped: after :meth:`stop`, with the tokens sampled so far.
        """
        if self._stopped:
            raise RequestStopped(GenerateResult((), (), "abort"))
        self._pending.add(request.request_id)
        try:
            result = await self._engine.generate(request)
        finally:
            self._pending.discard(request.request_id)
        if self._stopped and result.finish_reason == "abort":
            raise RequestStopped(result)
        return result

    async def stop(self) -> None:
        """Abort what is pending, where the engine can, and wait shortly for the tokens sampled so far."""
        self._stopped = True
        if not isinstance(self._engine, AbortableEngine):
            return
        await self._engine.abort(tuple(self._pending))
        deadline = time.monotonic() + ABORT_GRACE_S
        while self._pending and time.monotonic() < deadline:
            await asyncio.sleep(0.001)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """As the engine."""
        self._engine.update_weights(named_tensors, version)

    async def close(self) -> None:
        """The engine belongs to whoever made it."""


@dataclass(frozen=True, slots=True)
class Portion:
    """What one leader may roll out in a collection.

    Attributes:
        work: the counters; numbers drawn from it point into ``candidates``.
        wanted: complete groups, counted by ``work``, at which everybody stops.
        candidates: (prompt index, prompt) pairs that nobody holds, the same on every leader that shares ``work``.
        held: groups that this leader goes on with, with their prompts.
        born: step number of the ids of candidates that do not carry the collection's own.
        num_sharers: leaders that draw from ``work``.
    """

    work: SharedWork
    wanted: int
    candidates: Sequence[tuple[int, Prompt]]
    held: Sequence[tuple[HeldGroup, Prompt]] = ()
    born: Mapping[int, int] = field(default_factory=dict)
    num_sharers: int = 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one leader has when it stops, by prompt index: complete groups, a record of every started one, and what can
    be kept for a later step if it is not accepted. ``error`` is the first one of episodes whose infrastructure failed.
    """

    groups: dict[int, Group]
    records: list[GroupRecord]
    held: dict[int, HeldGroup] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The settings of a leader's part.

    Attributes:
        run: plays one episode. stop: ends pending requests.
        owner: this data-parallel rank.
        max_concurrency: episodes at a time. deadline_s: seconds for all of it.
        max_age: steps that a group which was stopped may be carried over; 0 keeps none.
    """

    step: int
    num_samples: int
    run: RunEpisode
    stop: Callable[[], Awaitable[None]]
    owner: int
    max_concurrency: int
    deadline_s: float
    max_age: int = 0


async def draw_groups(drawing: Drawing, portion: Portion) -> Drawn:
    """Roll out groups until enough are complete on all leaders, or nothing is left to draw: held ones first.

    A leader has an equal share of the candidates in flight, or as many as its concurrency holds, and draws the next one
    when one ends. An episode whose infrastructure failed runs once more under the same id.

    Raises:
        TimeoutError: after ``deadline_s``, naming unfinished groups.
        ValueError: of an episode, when the task or the settings are at fault.
    """
    return await _Leader(drawing, portion).play()


class _Leader:
    def __init__(self, drawing: Drawing, portion: Portion) -> None:
        self._d, self._p = drawing, portion
        self._turn = asyncio.Semaphore(drawing.max_concurrency)
        share = -(-len(portion.candidates) // portion.num_sharers) + len(portion.held)
        self._most = max(1, min(share, drawing.max_concurrency // drawing.num_samples))
        self._running: dict[asyncio.Task[Group | None], int] = {}
        self._finished: dict[TrajectoryId, Trajectory] = {}
        self._slots: dict[TrajectoryId, EpisodeSlot] = {}
        self._started: dict[int, HeldGroup] = {}
        self._groups: dict[int, Group] = {}
        self._waiting = list(portion.held)
        self._exhausted = self._stopping = False

    async def play(self) -> Drawn:
        deadline = time.monotonic() + self._d.deadline_s
        try:
            while self._p.work.num_complete < self._p.wanted:
                self._fill()
                if not self._running:
                    break
                if time.monotonic() > deadline:
                    self._refuse_late()
                await self._collect(POLL_S)
            self._stopping = True
            await self._d.stop()
            await self._collect(0.0)
        finally:
            self._stopping = True
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
        ends = [(before, self._held(before)) for before in self._started.values()]
        ends += [(before, before) for before, _ in self._waiting]  # held ones that had no turn
        records = [self._record(before, after) for before, after in ends]
        kept = {record.task for record in records if record.held}
        held = {after.task: after for _, after in ends if after.task in kept}
        return Drawn(self._groups, records, held, self._error())

    def _fill(self) -> None:
        while len(self._running) < self._most and (found := self._next()) is not None:
            before, prompt = found
            self._started[before.task] = before
            for key in self._ids(before):
                self._slots[key] = EpisodeSlot(before.partial.get(key.sample), resumable=self._d.max_age > 0)
                if key.sample in before.finished:
                    self._finished[key] = before.finished[key.sample]
            self._running[asyncio.create_task(self._group(before, prompt))] = before.task

    def _next(self) -> tuple[HeldGroup, Prompt] | None:
        if self._waiting:
            return self._waiting.pop(0)
        number = len(self._p.candidates) if self._exhausted else self._p.work.draw()
        self._exhausted = number >= len(self._p.candidates)
        if self._exhausted:
            return None
        index, prompt = self._p.candidates[number]
        return HeldGroup(self._p.born.get(index, self._d.step), index), prompt

    async def _collect(self, timeout_s: float) -> None:
        """Take in the groups that ended, waiting a while for one; their first error is everybody's."""
        if not self._running:
            return
        done, _ = await asyncio.wait(self._running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            index, group = self._running.pop(task), task.result()
            if group is None:
                continue  # it was stopped
            self._groups[index] = group
            if any(member.valid for member in group.trajectories):
                self._p.work.complete()

    async def _group(self, before: HeldGroup, prompt: Prompt) -> Group | None:
        ids = self._ids(before)
        open_ids = [key for key in ids if key not in self._finished]
        episodes = [asyncio.create_task(self._episode(prompt, key), name=str(key)) for key in open_ids]
        try:
            await asyncio.gather(*episodes)
        finally:  # after an error, or when cancelled
            for episode in episodes:
                episode.cancel()
            await asyncio.gather(*episodes, return_exceptions=True)
        complete = all(key in self._finished for key in ids)
        return Group(prompt, tuple(self._finished[key] for key in ids)) if complete else None

    async def _episode(self, prompt: Prompt, key: TrajectoryId) -> None:
        """Play one episode to its end, or until all are stopped."""
        slot = self._slots[key]
        try:
            async with self._turn:
                trajectory = await self._d.run(prompt, key, slot)
                if not trajectory.valid and not self._stopping:
                    trajectory = await self._d.run(prompt, key, slot)
        except RequestStopped:
            return
        if trajectory.valid or not self._stopping:
            self._finished[key] = trajectory

    def _ids(self, before: HeldGroup) -> list[TrajectoryId]:
        return [TrajectoryId(before.born, before.task, sample) for sample in range(self._d.num_samples)]

    def _held(self, before: HeldGroup) -> HeldGroup:
        """What a later step would go on with."""
        ids = self._ids(before)
        stopped = {key.sample: self._slots[key].partial() for key in ids if key not in self._finished}
        return HeldGroup(
            born=before.born,
            task=before.task,
            finished={key.sample: self._finished[key] for key in ids if key in self._finished},
            partial={sample: partial for sample, partial in stopped.items() if partial is not None},
        )

    def _record(self, before: HeldGroup, after: HeldGroup) -> GroupRecord:
        group = self._groups.get(before.task)
        episodes = after.episodes(self._d.num_samples)
        if before.task in self._started:
            episodes = tuple((self._tokens(key), key in self._finished) for key in self._ids(before))
        failed = group is not None and not any(member.valid for member in group.trajectories)
        young = self._d.step - before.born < self._d.max_age
        held = young and not failed and bool(after.finished or after.partial)
        kept = {*after.finished, *after.partial} if held else set()
        lost = [sample for sample, (length, _) in enumerate(episodes) if length and sample not in kept]
        return GroupRecord(
            task=before.task,
            owner=self._d.owner,
            complete=group is not None,
            failed=failed,
            episodes=episodes,
            born=before.born,
            held=held,
            resumed=len(before.partial) if before.task in self._started else 0,
            lost=len(lost),
            carried=before.num_sampled,
        )

    def _tokens(self, key: TrajectoryId) -> int:
        """Sampled tokens: of the trajectory if it ended (a first, failed attempt does not count), else so far."""
        ended = self._finished.get(key)
        if ended is None:
            return self._slots[key].num_sampled
        return num_sampled(ended)

    def _refuse_late(self) -> None:
        names = [f"{self._d.step}-{index}" for index in sorted(self._running.values())]
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        raise TimeoutError(
            f"{self._p.work.num_complete} of {self._p.wanted} groups were complete within {self._d.deadline_s:g} s, "
            f"unfinished here: {', '.join(names[:_MAX_NAMED])}{more} (step-task)"
        )

    def _error(self) -> str | None:
        members = (member for group in self._groups.values() for member in group.trajectories)
        return next((member.error for member in members if not member.valid), None)
