"""A leader's part of an over-sampled collection: draw groups from the shared work until enough are complete, then stop.

Which of them make up the step is not decided here but by all ranks together, from the records of every leader
(``rollout.acceptance``).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from spear_megatron.rollout.acceptance import GroupRecord
from spear_megatron.rollout.engine import AbortableEngine, Engine, GenerateRequest, GenerateResult
from spear_megatron.rollout.work import SharedWork
from spear_megatron.types import Group, Prompt, Trajectory, TrajectoryId

POLL_S = 0.02
ABORT_GRACE_S = 5.0
_MAX_NAMED = 10

RunEpisode = Callable[[Prompt, TrajectoryId], Awaitable[Trajectory]]


class StoppableEngine:
    """Passes requests on to an engine, counts what they sampled, and can end all of them at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending: set[str] = set()
        self._stopped = False
        self._sampled: Counter[str] = Counter()

    def num_sampled(self, trajectory: TrajectoryId) -> int:
        """Tokens sampled for a trajectory so far."""
        return self._sampled[str(trajectory)]

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """As the engine; after :meth:`stop` an aborted result without tokens."""
        if self._stopped:
            return GenerateResult((), (), "abort")
        self._pending.add(request.request_id)
        try:
            result = await self._engine.generate(request)
        finally:
            self._pending.discard(request.request_id)
        self._sampled[request.request_id.partition("/")[0]] += len(result.output_ids)
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
class Drawn:
    """What one leader has when it stops: its complete groups by prompt index, and a record of every started one."""

    groups: dict[int, Group]
    records: list[GroupRecord]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The settings of a leader's part.

    Attributes:
        candidates: (prompt index, prompt) pairs, the same on every leader; numbers of the shared work point into it.
        wanted: groups at whose completion, anywhere, everybody stops.
        run: plays one episode.
        stop: ends pending requests. num_sampled: tokens of a trajectory so far.
        owner: this data-parallel rank. num_owners: all of them.
        max_concurrency: episodes at a time. deadline_s: seconds for all of it.
    """

    candidates: Sequence[tuple[int, Prompt]]
    step: int
    num_samples: int
    wanted: int
    run: RunEpisode
    stop: Callable[[], Awaitable[None]]
    num_sampled: Callable[[TrajectoryId], int]
    owner: int
    num_owners: int
    max_concurrency: int
    deadline_s: float


async def draw_groups(drawing: Drawing, work: SharedWork) -> Drawn:
    """Draw and roll out groups until ``drawing.wanted`` are complete on all leaders, or nothing is left to draw.

    A leader has an equal share of the candidates in flight, or as many as its concurrency holds, and draws the next one
    when one ends. An episode whose infrastructure failed runs once more under the same id.

    Raises:
        TimeoutError: after ``deadline_s``, naming unfinished groups.
        RuntimeError: every complete group of this leader failed; carries the first error.
        ValueError: of an episode, when the task or the settings are at fault.
    """
    return await _Leader(drawing, work).play()


class _Leader:
    def __init__(self, drawing: Drawing, work: SharedWork) -> None:
        self._d, self._work = drawing, work
        self._turn = asyncio.Semaphore(drawing.max_concurrency)
        share = -(-len(drawing.candidates) // drawing.num_owners)
        self._most = max(1, min(share, drawing.max_concurrency // drawing.num_samples))
        self._running: dict[asyncio.Task[Group], int] = {}
        self._finished: dict[TrajectoryId, Trajectory] = {}
        self._started: list[int] = []
        self._groups: dict[int, Group] = {}
        self._exhausted = self._stopping = False

    async def play(self) -> Drawn:
        deadline = time.monotonic() + self._d.deadline_s
        try:
            while self._work.num_complete < self._d.wanted:
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
        self._refuse_total_failure()
        return Drawn(self._groups, [self._record(task) for task in self._started])

    def _fill(self) -> None:
        while not self._exhausted and len(self._running) < self._most:
            number = self._work.draw()
            self._exhausted = number >= len(self._d.candidates)
            if not self._exhausted:
                index, prompt = self._d.candidates[number]
                self._started.append(index)
                self._running[asyncio.create_task(self._group(index, prompt), name=f"group-{index}")] = index

    async def _collect(self, timeout_s: float) -> None:
        """Take in the groups that ended, waiting a while for one; their first error is everybody's."""
        if not self._running:
            return
        done, _ = await asyncio.wait(self._running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            index = self._running.pop(task)
            group = task.result()
            if self._stopping and any(self._unfinished(member.id) for member in group.trajectories):
                continue  # its requests were aborted: it did not end by itself
            self._groups[index] = group
            if any(member.valid for member in group.trajectories):
                self._work.complete()

    async def _group(self, index: int, prompt: Prompt) -> Group:
        ids = [TrajectoryId(self._d.step, index, sample) for sample in range(self._d.num_samples)]
        episodes = [asyncio.create_task(self._episode(prompt, key), name=str(key)) for key in ids]
        try:
            return Group(prompt, tuple(await asyncio.gather(*episodes)))
        finally:  # after an error, or when cancelled
            for episode in episodes:
                episode.cancel()
            await asyncio.gather(*episodes, return_exceptions=True)

    async def _episode(self, prompt: Prompt, key: TrajectoryId) -> Trajectory:
        async with self._turn:
            trajectory = await self._d.run(prompt, key)
            if not trajectory.valid and not self._stopping:
                trajectory = await self._d.run(prompt, key)
        if trajectory.valid or not self._stopping:
            self._finished[key] = trajectory
        return trajectory

    def _unfinished(self, key: TrajectoryId) -> bool:
        return key not in self._finished

    def _record(self, index: int) -> GroupRecord:
        ids = [TrajectoryId(self._d.step, index, sample) for sample in range(self._d.num_samples)]
        group = self._groups.get(index)
        return GroupRecord(
            task=index,
            owner=self._d.owner,
            complete=group is not None,
            failed=group is not None and not any(member.valid for member in group.trajectories),
            episodes=tuple((self._tokens(key), key in self._finished) for key in ids),
        )

    def _tokens(self, key: TrajectoryId) -> int:
        """Sampled tokens: of the trajectory if it ended (a first, failed attempt does not count), else so far."""
        ended = self._finished.get(key)
        if ended is None:
            return self._d.num_sampled(key)
        return sum(int(segment.response_mask.sum()) for segment in ended.segments)

    def _refuse_late(self) -> None:
        names = [f"{self._d.step}-{index}" for index in sorted(self._running.values())]
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        raise TimeoutError(
            f"{self._work.num_complete} of {self._d.wanted} groups were complete within {self._d.deadline_s:g} s, "
            f"unfinished here: {', '.join(names[:_MAX_NAMED])}{more} (step-task)"
        )

    def _refuse_total_failure(self) -> None:
        members = [member for group in self._groups.values() for member in group.trajectories]
        if members and not any(member.valid for member in members):
            raise RuntimeError(f"infrastructure failed in all {len(members)} episodes, first: {members[0].error}")
