"""Collecting a step's groups: leaders run agent loops for their own tasks, peers wait outside any collective."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from spear_megatron.data.index import IndexRow, gather_index
from spear_megatron.parallel.agreement import agree_ok, forget_heartbeat, heartbeat, wait_for_leaders
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.types import Group, Prompt

GRACE_S = 60.0

RunGroups = Callable[..., Awaitable[list[Group]]]


@dataclass(frozen=True, slots=True)
class Tasks:
    """What to roll out: (prompt index, prompt) pairs, samples each, sampling, and the purpose that keys the noise."""

    purpose: str
    step: int
    prompts: tuple[tuple[int, Prompt], ...]
    num_samples: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Collected:
    """``groups`` of this leader (none on other ranks) and the ``index`` of every trajectory, equal on all ranks."""

    groups: list[Group]
    index: list[IndexRow]


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
    ) -> None:
        """Bind what a collection needs.

        Args:
            run_groups: rolls out (tasks, own prompts) within ``timeout_s``; None on ranks that are not leaders.
            leaders: global ranks of all leaders.
            grace_s: how much longer than ``timeout_s`` others wait, so that a late leader can name what is unfinished.
        """
        self._parallel = parallel
        self._run_groups = run_groups
        self._leaders = leaders
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._runner = asyncio.Runner()

    def collect(self, tasks: Tasks) -> Collected:
        """Roll out every task somewhere and return this leader's groups with the common index.

        Raises:
            RunError: on every rank, when any leader failed; names phase, ranks and messages.
            RunTimeout: a leader stayed silent beyond the deadline.
        """
        phase = f"collect/{tasks.purpose}/{tasks.step}"
        groups: list[Group] = []
        failure: Exception | None = None
        if self._run_groups is not None:
            own = share_of(tasks.prompts, tasks.step, self._parallel.dp_rank, self._parallel.dp_size)
            try:
                with heartbeat(self._parallel, phase):
                    groups = self._runner.run(self._roll_out(tasks, own))
            except Exception as error:  # also one of the user's code: every rank stops, with its message
                failure = error
        if self._parallel.world_size > 1:
            wait_for_leaders(self._parallel, phase, self._leaders, self._timeout_s + self._grace_s)
        try:
            agree_ok(self._parallel, phase, None if failure is None else _described(failure))
        except RunError as stop:
            raise stop from failure
        forget_heartbeat(self._parallel, phase)
        return Collected(groups, gather_index(groups, self._parallel))

    async def _roll_out(self, tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
        assert self._run_groups is not None
        return await self._run_groups(tasks, own)

    def close(self, *closers: Callable[[], Awaitable[None]]) -> None:
        """Close the engine and the sandbox on their own loop, then the loop."""
        with contextlib.ExitStack() as stack:  # each runs though an earlier one failed
            stack.callback(self._runner.close)
            for closer in reversed(closers):
                stack.callback(lambda call: self._runner.run(_await(call)), closer)


def _described(failure: Exception) -> str:
    """The failure in one line; with its place where the message alone would not tell what happened."""
    text = f"{type(failure).__name__}: {failure}"
    if isinstance(failure, (RuntimeError, ValueError, OSError)):
        return text
    place = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{text} ({place.filename.rpartition('/')[2]}:{place.lineno})"


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
    )
