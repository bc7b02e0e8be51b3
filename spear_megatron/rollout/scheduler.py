"""All episodes of a step at once: bounded concurrency, one deadline, results in id order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from spear_megatron.data.chat import ChatRenderer
from spear_megatron.environments.protocol import Environment, Reward
from spear_megatron.parallel.seeds import derive_key
from spear_megatron.rollout.agent_loop import EpisodeLimits, run_episode
from spear_megatron.rollout.engine import Engine, SamplingParams
from spear_megatron.rollout.partial import EpisodeSlot
from spear_megatron.types import Group, Prompt, Trajectory, TrajectoryId

RunEpisode = Callable[[Prompt, TrajectoryId], Awaitable[Trajectory]]
_MAX_NAMED = 10


class Keeper(Protocol):
    """Takes every episode when it is finished, and knows those that an earlier process finished."""

    def has(self, trajectory_id: TrajectoryId) -> bool:
        """Whether this episode was finished before, so that it need not run."""
        ...

    def keep(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Keep a finished episode, also one whose infrastructure failed. Raising ends the collection."""
        ...


@dataclass(frozen=True, kw_only=True)
class EpisodeRunner:
    """Everything that the episodes of a phase share. ``purpose`` separates the noise of training and evaluation."""

    engine: Engine
    renderer: ChatRenderer
    environment_factory: Callable[[], Environment]
    reward: Reward
    limits: EpisodeLimits
    sampling: SamplingParams
    seed: int
    purpose: str

    async def __call__(
        self, prompt: Prompt, trajectory_id: TrajectoryId, slot: EpisodeSlot | None = None
    ) -> Trajectory:
        """Run one episode, with noise keyed by (seed, purpose, id); ``slot`` as in :func:`run_episode`."""
        return await run_episode(
            engine=self.engine,
            renderer=self.renderer,
            environment=self.environment_factory(),
            reward=self.reward,
            prompt=prompt,
            trajectory_id=trajectory_id,
            noise_key=derive_key(self.seed, f"rollout/{self.purpose}", *trajectory_id),
            limits=self.limits,
            sampling=self.sampling,
            slot=slot,
        )


async def collect_groups(
    prompts: Sequence[tuple[int, Prompt]],
    *,
    run: RunEpisode,
    step: int,
    num_samples: int,
    max_concurrency: int,
    deadline_s: float,
    on_progress: Callable[[int, int], None] | None = None,
    keeper: Keeper | None = None,
) -> list[Group]:
    """Roll out ``num_samples`` episodes of every (task index, prompt) pair, at most ``max_concurrency`` at a time.

    An episode whose infrastructure failed runs once more under the same id; if it fails again it is kept as such.
    ``on_progress`` gets the numbers of finished and of all episodes. Groups come in task order, samples in theirs.
    Episodes that ``keeper`` has do not run, and are missing in the groups; the others are given to it one by one.

    Raises:
        TimeoutError: after ``deadline_s`` seconds, naming the unfinished ids.
        RuntimeError: every episode failed, and ``keeper`` had none; carries the first error.
        ValueError: of an episode, when the task or the settings are at fault. All other episodes are cancelled.
    """
    if max_concurrency < 1:
        raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
    turn = asyncio.Semaphore(max_concurrency)
    tasks: dict[TrajectoryId, asyncio.Task[Trajectory]] = {}

    num_finished = num_known = 0

    async def episode(prompt: Prompt, trajectory_id: TrajectoryId) -> Trajectory:
        nonlocal num_finished
        async with turn:
            trajectory = await run(prompt, trajectory_id)
            if not trajectory.valid:
                trajectory = await run(prompt, trajectory_id)
        if keeper is not None:
            keeper.keep(prompt, trajectory)
        num_finished += 1
        if on_progress is not None:
            on_progress(num_finished, len(tasks))
        return trajectory

    for index, prompt in sorted(prompts, key=lambda pair: pair[0]):
        for sample in range(num_samples):
            trajectory_id = TrajectoryId(step, index, sample)
            if keeper is not None and keeper.has(trajectory_id):
                num_known += 1
                continue
            tasks[trajectory_id] = asyncio.create_task(episode(prompt, trajectory_id), name=str(trajectory_id))
    await _finish(tasks, deadline_s)
    results = {trajectory_id: task.result() for trajectory_id, task in tasks.items()}
    if not num_known:
        _refuse_total_failure(list(results.values()))
    groups = []
    for index, prompt in sorted(prompts, key=lambda pair: pair[0]):
        ids = [TrajectoryId(step, index, sample) for sample in range(num_samples)]
        if members := tuple(results[trajectory_id] for trajectory_id in ids if trajectory_id in results):
            groups.append(Group(prompt, members))
    return groups


async def _finish(tasks: dict[TrajectoryId, asyncio.Task[Trajectory]], deadline_s: float) -> None:
    """Wait for all; on the first exception, at the deadline or when cancelled, cancel and await the rest."""
    if not tasks:
        return
    try:
        done, pending = await asyncio.wait(tasks.values(), timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if pending:
            names = [str(trajectory_id) for trajectory_id, task in tasks.items() if not task.done()]
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            raise TimeoutError(
                f"{len(names)} of {len(tasks)} episodes did not finish within {deadline_s:g} s: "
                f"{', '.join(names[:_MAX_NAMED])}{more} (step-task-sample)"
            )
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


def _refuse_total_failure(trajectories: Sequence[Trajectory]) -> None:
    if trajectories and not any(trajectory.valid for trajectory in trajectories):
        raise RuntimeError(f"infrastructure failed in all {len(trajectories)} episodes, first: {trajectories[0].error}")
