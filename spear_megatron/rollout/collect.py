"""Collecting a step's groups: leaders run agent loops for their own tasks, peers wait outside any collective.

Only the main thread takes part in collectives. With a background loop the rollouts of a collection that was begun go on
in a thread of each leader until it is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch.distributed as dist

from spear_megatron.data.index import IndexRow, gather_index
from spear_megatron.parallel.agreement import (
    agree_ok,
    agreed,
    forget_heartbeat,
    gather_objects,
    heartbeat,
    wait_for_leaders,
)
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.acceptance import Acceptance, AcceptanceLog, GroupRecord, accept
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.rollout.loop_thread import CLOSE_S, LoopThread
from spear_megatron.rollout.oversampling import Drawn, Portion
from spear_megatron.rollout.partial import HeldGroup
from spear_megatron.rollout.scheduler import Keeper
from spear_megatron.rollout.work import SharedWork
from spear_megatron.types import Group, Prompt

GRACE_S = 60.0
_LOG = logging.getLogger(__name__)

RunGroups = Callable[..., Awaitable[list[Group]]]


@dataclass(frozen=True, slots=True)
class Tasks:
    """What to roll out: (prompt index, prompt) pairs, samples each, sampling, and the purpose that keys the noise.

    With ``wanted`` the prompts are candidates, and the collection ends as soon as so many of their groups are complete;
    ``batch`` then tells the collections of one step apart. ``keeper``, on leaders and without ``wanted``, takes every
    episode as it ends and names those that need not run.
    """

    purpose: str
    step: int
    prompts: tuple[tuple[int, Prompt], ...]
    num_samples: int
    sampling: SamplingParams
    wanted: int | None = None
    batch: int = 0
    keeper: Keeper | None = None


RunDrawn = Callable[[Tasks, Portion], Awaitable[Drawn]]


@dataclass(frozen=True, slots=True)
class Collected:
    """``groups`` of this leader (none on other ranks) and the ``index`` of every trajectory, equal on all ranks.

    ``acceptances`` are the decisions on over-sampled collections; ``seconds`` the time of this rank's own rollouts.
    """

    groups: list[Group]
    index: list[IndexRow]
    acceptances: tuple[Acceptance, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """How this rank rolls out a collection: its own tasks, or a portion; ``known`` is a decision to repeat."""

    tasks: Tasks
    phase: str
    own: list[tuple[int, Prompt]]
    portion: Portion | None = None
    known: Acceptance | None = None


@dataclass(slots=True)
class _Outcome:
    """What this leader has, or why it has nothing."""

    groups: list[Group] = field(default_factory=list)
    drawn: Drawn | None = None
    failure: Exception | None = None
    seconds: float = 0.0


class Collector:
    """Runs the agent loops of this data-parallel rank's tasks on one asyncio loop that lives as long as the run."""

    def __init__(
        self,
        parallel: ParallelState,
        run_groups: RunGroups | None,
        *,
        leaders: list[int],
        timeout_s: float,
        grace_s: float = GRACE_S,
        run_drawn: RunDrawn | None = None,
        background: bool = False,
        decisions: AcceptanceLog | None = None,
    ) -> None:
        """Bind what a collection needs.

        Args:
            run_groups: rolls out (tasks, own prompts) within ``timeout_s``; None on ranks that are not leaders.
            leaders: global ranks of all leaders.
            grace_s: how much longer than ``timeout_s`` others wait, so that a late leader can name what is unfinished.
            run_drawn: rolls out what it draws from the shared work, for tasks with ``wanted``.
            background: keep the loop on a thread, so that :meth:`begin` returns at once.
            decisions: the record of what was accepted; None keeps it in memory.
        """
        self._parallel = parallel
        self._run_groups = run_groups
        self._run_drawn = run_drawn
        self._leaders = leaders
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._runner: asyncio.Runner | LoopThread = LoopThread("rollouts") if background else asyncio.Runner()
        self._decisions = decisions or AcceptanceLog()
        self._begun: tuple[_Plan, Future[_Outcome] | None] | None = None
        self._held: dict[int, HeldGroup] = {}
        self._holders: dict[int, int] = {}

    def collect(self, tasks: Tasks) -> Collected:
        """Roll out every task somewhere and return this leader's groups with the common index.

        Raises:
            RunError: on every rank, when any leader failed, or infrastructure in every group of all leaders; names
                phase, ranks and messages.
            RunTimeout: a leader stayed silent beyond the deadline.
        """
        plan = self._plan(tasks)
        outcome = self._runner.run(self._roll_out(plan)) if self._run_groups is not None else _Outcome()
        return self._agree(plan, outcome)

    def begin(self, tasks: Tasks) -> None:
        """Start a collection in the background and return. Nothing may be collected before :meth:`end`.

        Raises:
            RuntimeError: the collector has no background loop, or a collection was begun already.
        """
        if not isinstance(self._runner, LoopThread) or self._begun is not None:
            raise RuntimeError("begin needs a collector with background=True and no collection under way")
        plan = self._plan(tasks)
        future = self._runner.submit(self._roll_out(plan)) if self._run_groups is not None else None
        self._begun = (plan, future)

    def end(self) -> Collected:
        """Wait for the collection that was begun; collective.

        Raises:
            RuntimeError: none was begun.
            RunError, RunTimeout: as :meth:`collect`.
        """
        if self._begun is None:
            raise RuntimeError("no collection was begun")
        (plan, future), self._begun = self._begun, None
        return self._agree(plan, future.result() if future is not None else _Outcome())

    def _plan(self, tasks: Tasks) -> _Plan:
        parallel, phase = self._parallel, f"collect/{tasks.purpose}/{tasks.step}"
        if tasks.wanted is None:
            own = share_of(tasks.prompts, tasks.step, parallel.dp_rank, parallel.dp_size)
            return _Plan(tasks, phase, own)
        known = self._decisions.find(tasks.step, tasks.batch, tasks.wanted, [index for index, _ in tasks.prompts])
        mine = [(self._held[index], prompt) for index, prompt in tasks.prompts if index in self._held]
        if known is None:
            work = SharedWork(parallel.store, f"work/{phase}/{tasks.batch}")
            free = [pair for pair in tasks.prompts if pair[0] not in self._holders]
            portion = Portion(work, tasks.wanted, free, mine, num_sharers=parallel.dp_size)
            return _Plan(tasks, phase, [], portion)
        owners = {task: self._holders.get(task, owner % parallel.dp_size) for task, owner in known.owners.items()}
        free = [pair for pair in tasks.prompts if owners.get(pair[0]) == parallel.dp_rank and pair[0] not in self._held]
        mine = [(before, prompt) for before, prompt in mine if before.task in owners]
        work = SharedWork(dist.HashStore(), phase)
        return _Plan(tasks, phase, [], Portion(work, len(free) + len(mine), free, mine, known.born), known)

    async def _roll_out(self, plan: _Plan) -> _Outcome:
        """A failure is kept: also one of the user's code must stop every rank, with its message."""
        assert self._run_groups is not None
        outcome, start = _Outcome(), time.monotonic()
        try:
            with heartbeat(self._parallel, plan.phase):
                if plan.portion is None:
                    outcome.groups = await self._run_groups(plan.tasks, plan.own)
                else:
                    assert self._run_drawn is not None
                    outcome.drawn = await self._run_drawn(plan.tasks, plan.portion)
        except Exception as error:
            outcome.failure = error
        outcome.seconds = time.monotonic() - start
        return outcome

    def _agree(self, plan: _Plan, outcome: _Outcome) -> Collected:
        """The one point at which a collection ends for all ranks."""
        if self._parallel.world_size > 1:
            wait_for_leaders(self._parallel, plan.phase, self._leaders, self._timeout_s + self._grace_s)
        failure = outcome.failure
        try:
            agree_ok(self._parallel, plan.phase, None if failure is None else _described(failure))
        except RunError as stop:
            raise stop from failure
        forget_heartbeat(self._parallel, plan.phase)
        groups = outcome.groups
        acceptances: tuple[Acceptance, ...] = ()
        if plan.portion is not None:
            acceptance = self._accept(plan, plan.portion, outcome.drawn)
            complete = outcome.drawn.groups if outcome.drawn is not None else {}
            groups = sorted((complete[task] for task in acceptance.accepted if task in complete), key=_group_id)
            acceptances = (acceptance,)
        return Collected(groups, gather_index(groups, self._parallel), acceptances, outcome.seconds)

    def _accept(self, plan: _Plan, portion: Portion, drawn: Drawn | None) -> Acceptance:
        """Decide, or repeat the decision; whoever holds a group that goes on keeps it, and all ranks know that."""
        tasks, acceptance = plan.tasks, plan.known
        assert tasks.wanted is not None
        if acceptance is not None:
            # What the record let expire is gone here too: its prompt starts anew.
            gone = {*acceptance.accepted, *(set(acceptance.candidates) - acceptance.held.keys())}
            self._holders = {task: owner for task, owner in self._holders.items() if task not in gone}
        else:
            own = drawn.records if drawn is not None else []
            error = drawn.error if drawn is not None else None
            parts = gather_objects(self._parallel, (own, error))
            records = [record for part, _ in parts for record in part]
            _refuse_total_failure(plan.phase, records, [text for _, text in parts if text is not None])
            candidates = [index for index, _ in tasks.prompts]
            acceptance = accept(tasks.step, tasks.batch, tasks.wanted, candidates, records)
            with agreed(self._parallel, f"recording of {plan.phase}"):
                self._decisions.write(acceptance)
            if self._parallel.rank == 0:
                portion.work.forget()
            others = {task: owner for task, owner in self._holders.items() if task not in set(candidates)}
            self._holders = {**others, **acceptance.held}
        known = {**self._held, **(drawn.held if drawn is not None else {})}
        self._held = {task: before for task, before in known.items() if task in self._mine}
        return acceptance

    @property
    def _mine(self) -> set[int]:
        leads, rank = self._run_groups is not None, self._parallel.dp_rank
        return {task for task, owner in self._holders.items() if leads and owner == rank}

    @property
    def held(self) -> list[HeldGroup]:
        """Groups that this leader goes on with in a later step."""
        return [self._held[task] for task in sorted(self._held)]

    def hold(self, groups: Sequence[tuple[int, HeldGroup]]) -> None:
        """Take over (data-parallel rank, group) pairs of an earlier process; every rank is given the same ones."""
        self._holders = {group.task: owner for owner, group in groups}
        self._held = {group.task: group for _, group in groups if group.task in self._mine}

    def close(self, *closers: Callable[[], Awaitable[None]]) -> None:
        """Close the engine and the sandbox on their own loop, then the loop.

        What blocks the background loop does not hold up the end: it is logged, and left to the end of the process.
        """
        with contextlib.ExitStack() as stack:  # each runs though an earlier one failed
            stack.callback(self._runner.close)
            for closer in reversed(closers):
                stack.callback(self._close_one, closer)

    def _close_one(self, closer: Callable[[], Awaitable[None]]) -> None:
        if not isinstance(self._runner, LoopThread):
            self._runner.run(_await(closer))
            return
        try:
            self._runner.run(_await(closer), CLOSE_S)
        except TimeoutError as error:
            _LOG.warning("closing after the rollouts goes on without an answer: %s", error)


def _refuse_total_failure(phase: str, records: Sequence[GroupRecord], errors: Sequence[str]) -> None:
    """RunError where every group that any leader started failed: there is nothing to train on, and a reason to name."""
    if errors and records and all(record.failed for record in records):
        raise RunError(f"{phase}: infrastructure failed in all {len(records)} groups of all ranks, first: {errors[0]}")


def _described(failure: Exception) -> str:
    """The failure in one line; with its place where the message alone would not tell what happened."""
    text = f"{type(failure).__name__}: {failure}"
    if isinstance(failure, (RuntimeError, ValueError, OSError)):
        return text
    place = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{text} ({place.filename.rpartition('/')[2]}:{place.lineno})"


def _group_id(group: Group) -> tuple[int, int]:
    return group.id


async def _await(closer: Callable[[], Awaitable[None]]) -> None:
    await closer()


def share_of(prompts: Sequence[tuple[int, Prompt]], step: int, dp_rank: int, dp_size: int) -> list[tuple[int, Prompt]]:
    """Task groups of one leader, assigned by (step, position in the step)."""
    return [pair for position, pair in enumerate(prompts) if (step + position) % dp_size == dp_rank]


def merge(first: Collected, second: Collected) -> Collected:
    """Two collections of one step as one, in id order."""
    return Collected(
        sorted([*first.groups, *second.groups], key=lambda group: group.id),
        sorted([*first.index, *second.index], key=lambda row: row.id),
        (*first.acceptances, *second.acceptances),
        first.seconds + second.seconds,
    )
