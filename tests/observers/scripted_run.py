"""The real run with scripted rollouts, and single episodes with a scripted policy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from spear_megatron.config.schema import Config
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.types import Group, Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId


class Echo:
    """An environment without tools: answers every turn with a long tool message until the policy boxes an answer.

    It has no state, so that it can be restored.
    """

    def __init__(self, *, reply: str = "go on " * 8) -> None:
        self._reply = reply

    async def reset(self, prompt: Prompt) -> Observation:
        """The prompt's own messages."""
        return Observation(messages=prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        """Go on, or end."""
        if "boxed" in turn.text:
            return StepResult(done=True)
        return StepResult(messages=({"role": "tool", "content": self._reply},), num_tool_calls=1)

    def snapshot(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    async def restore(self, prompt: Prompt, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""

    async def close(self) -> None:
        """Nothing to free."""


class Hanging(Echo):
    """An environment that never starts."""

    async def reset(self, prompt: Prompt) -> Observation:
        """Wait for ever."""
        await asyncio.sleep(3600)
        raise AssertionError


NO_SANDBOX = ("env.name=observers.scripted_run:Echo",)


@dataclass
class ScriptedRun:
    """What a run asked of its collector, wrote into its record and left on disk. ``make`` invents its trajectories."""

    make: Callable[[Prompt, TrajectoryId], Trajectory] = field(default_factory=lambda: trajectory)
    tasks: list[Any] = field(default_factory=list)
    evaluations: list[Any] = field(default_factory=list)
    record: list[Mapping[str, float]] = field(default_factory=list)
    updates: list[list[tuple[Any, int]]] = field(default_factory=list)
    replayed: list[list[tuple[Any, int]]] = field(default_factory=list)


def trajectory(prompt: Prompt, task: TrajectoryId) -> Trajectory:
    """A trajectory of 3 to 6 sampled tokens after 4, with reward 1 for every third sample."""
    generator = torch.Generator().manual_seed(31 * task.task + task.sample)
    sampled = 3 + (task.task + task.sample) % 4
    ids = torch.randint(5, 200, (4 + sampled,), generator=generator, dtype=torch.int32)
    mask = torch.arange(4 + sampled) >= 4
    won = float((task.task + task.sample) % 3 == 0)
    segment = Segment(ids, mask, -torch.rand(4 + sampled, generator=generator) * mask)
    messages = ({"role": "assistant", "content": f"\\boxed{{{task.sample}}}"},)
    return Trajectory(
        task, (segment,), RewardParts(won, 1, success=won > 0), StopReason.ANSWER, 0, num_turns=1, messages=messages
    )


def scripted_collector(journal: ScriptedRun, parallel: Any, background: bool = False) -> Any:
    """The real collector over rollouts that give the same trajectories for the same ids."""
    from spear_megatron.rollout.acceptance import GroupRecord
    from spear_megatron.rollout.collect import Collector
    from spear_megatron.rollout.oversampling import Drawn

    async def run_groups(tasks: Any, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
        (journal.tasks if tasks.purpose == "train" else journal.evaluations).append(tasks)
        samples = range(tasks.num_samples)
        return [
            Group(prompt, tuple(journal.make(prompt, TrajectoryId(tasks.step, index, sample)) for sample in samples))
            for index, prompt in own
        ]

    async def run_drawn(tasks: Any, portion: Any) -> Drawn:
        """The first groups that are drawn are complete, one more is not."""
        own = [portion.candidates[portion.work.draw()] for _ in range(tasks.wanted)]
        groups = await run_groups(tasks, own)
        records = [GroupRecord(index, 0, True, False, ((4, True),)) for index, _ in own]
        records.append(GroupRecord(portion.candidates[portion.work.draw()][0], 0, False, False, ((9, False),)))
        return Drawn({group.id[1]: group for group in groups}, records)

    return Collector(parallel, run_groups, leaders=[0], timeout_s=60.0, run_drawn=run_drawn, background=background)


@contextlib.contextmanager
def scripted(config: Config, journal: ScriptedRun) -> Iterator[Any]:
    """The run that the command line would make, with a scripted collector and without an engine to publish to."""
    from spear_megatron.cli.build import open_run
    from spear_megatron.cli.session import StopFlag

    config = replace(config, env=replace(config.env, name=NO_SANDBOX[0].partition("=")[2]))
    with open_run(config, StopFlag()) as run:
        update = run.parts.actor.update

        def noted(rows: Sequence[Any], **options: Any) -> Any:
            journal.updates.append([(row.trajectory, row.segment) for row in rows])
            replay = options.get("replay")
            journal.replayed.append([(row.trajectory, row.segment) for row in replay.rows] if replay else [])
            return update(rows, **options)

        run.parts.actor.update = noted
        collector = scripted_collector(journal, run.parts.parallel, config.trainer.async_ > 0)
        run.parts = replace(run.parts, collector=collector, publish_weights=lambda version: None)
        yield run
        collector.close()


def run_scripted(
    config: Config, make: Callable[[Prompt, TrajectoryId], Trajectory] | None = None
) -> ScriptedRun:
    """Train to the end with scripted rollouts."""
    from spear_megatron.observability.record import read_record
    from spear_megatron.trainer.loop import train

    journal = ScriptedRun(make=make or trajectory)
    with scripted(config, journal) as run:
        train(run)
    machine = ("timing_s/", "perf/", "unix_time")
    for line in read_record(config.trainer.default_local_dir):
        journal.record.append({key: value for key, value in line.items() if not key.startswith(machine)})
    return journal


def figure(*names: str, make: Callable[[Prompt, TrajectoryId], Trajectory] | None = None) -> Callable[..., Any]:
    """Observer function: these figures of every step of a scripted run."""

    def observe(config: Config, scratch: Any) -> Any:
        return [[line.get(name) for name in names] for line in run_scripted(config, make).record]

    return observe


def episode(config: Config, texts: Sequence[str], environment: Any = None) -> Any:
    """Stop reason, turns, tokens and messages of one episode in which the policy says ``texts`` in turn."""
    from scripted import ScriptedEngine, tiny_renderer

    from spear_megatron.cli.agents import episode_limits, samplings
    from spear_megatron.rollout.scheduler import EpisodeRunner

    async def no_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        return trajectory.reward

    runner = EpisodeRunner(
        engine=ScriptedEngine(texts), renderer=tiny_renderer(), environment_factory=environment or Echo,
        reward=no_reward, limits=episode_limits(config), sampling=samplings(config)[0], seed=0, purpose="train",
    )  # fmt: skip
    prompt = Prompt("task", ({"role": "user", "content": "What is 12 + 30? Think, then box the answer."},))
    result = asyncio.run(runner(prompt, TrajectoryId(1, 0, 0)))
    tokens = [len(segment.ids) for segment in result.segments]
    return result.stop_reason.value, result.num_turns, tokens, [message["content"] for message in result.messages]
