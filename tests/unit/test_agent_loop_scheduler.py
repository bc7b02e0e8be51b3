"""Collecting groups: order, bound, retry, deadline, progress."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from scripted import ScriptedEngine, tiny_renderer
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.rollout.agent_loop import EpisodeLimits
from spear_megatron.rollout.engine import EngineError, SamplingParams
from spear_megatron.rollout.scheduler import EpisodeRunner, collect_groups
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory, TrajectoryId

PROMPTS = [(4, Prompt("d", ({"role": "user", "content": "4"},))), (1, Prompt("a", ({"role": "user", "content": "1"},)))]


class Chat:
    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(messages=prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        return StepResult(done=True)

    async def close(self) -> None: ...


async def no_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
    return RewardParts(outcome=0.0)


def runner(engine: ScriptedEngine, **changes: object) -> EpisodeRunner:
    settings = EpisodeRunner(
        engine=engine, renderer=tiny_renderer(), environment_factory=Chat, reward=no_reward, seed=0, purpose="train",
        limits=EpisodeLimits(max_turns=2, max_prompt_length=50, max_response_length=50, max_model_len=100,
                             max_tool_response_length=50),
        sampling=SamplingParams(max_new_tokens=50),
    )
    return dataclasses.replace(settings, **changes)


def collect(run: object, **kwargs: object) -> list:
    settings = {"step": 7, "num_samples": 3, "max_concurrency": 4, "deadline_s": 30.0, **kwargs}
    prompts = settings.pop("prompts", PROMPTS)
    return asyncio.run(collect_groups(prompts, run=run, **settings))


def test_groups_come_in_id_order_with_bounded_concurrency_and_progress() -> None:
    engine = ScriptedEngine(["hello"], delay_s=0.01)
    progress: list[tuple[int, int]] = []
    groups = collect(runner(engine), max_concurrency=2, on_progress=lambda done, total: progress.append((done, total)))
    assert [group.prompt.task_id for group in groups] == ["a", "d"]
    assert [t.id for group in groups for t in group.trajectories] == [
        TrajectoryId(7, task, sample) for task in (1, 4) for sample in range(3)
    ]
    assert engine.most_running == 2
    assert progress == [(done, 6) for done in range(1, 7)]


def test_noise_is_keyed_by_id_seed_and_purpose() -> None:
    def keys(**changes: object) -> dict[str, int]:
        engine = ScriptedEngine(["hello"])
        collect(runner(engine, **changes))
        return {request.request_id: request.noise_key for request in engine.requests}

    first = keys()
    assert len(set(first.values())) == 6
    assert keys() == first
    assert not set(keys(seed=1).values()) & set(first.values())
    assert not set(keys(purpose="evaluate").values()) & set(first.values())


def test_infrastructure_failure_is_retried_once_under_the_same_id() -> None:
    attempts: dict[TrajectoryId, int] = {}
    good = runner(ScriptedEngine(["hello"]))
    bad = runner(ScriptedEngine([EngineError("down")]))

    async def run(prompt: Prompt, trajectory_id: TrajectoryId) -> Trajectory:
        attempts[trajectory_id] = attempts.get(trajectory_id, 0) + 1
        fails = trajectory_id.sample == 2 or (trajectory_id.sample == 1 and attempts[trajectory_id] == 1)
        return await (bad if fails else good)(prompt, trajectory_id)

    groups = collect(run)
    for group in groups:
        reasons = [t.stop_reason for t in group.trajectories]
        assert reasons == [StopReason.ANSWER, StopReason.ANSWER, StopReason.INFRASTRUCTURE]
        assert group.trajectories[2].error == "engine: down"
    assert sorted(attempts.values()) == [1, 1, 2, 2, 2, 2]


def test_failure_of_everything_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="all 6 episodes, first: engine: down"):
        collect(runner(ScriptedEngine([EngineError("down")])))


def test_deadline_names_the_unfinished_ids() -> None:
    cancelled = []

    async def run(prompt: Prompt, trajectory_id: TrajectoryId) -> Trajectory:
        if trajectory_id.sample == 1:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(trajectory_id)
                raise
        return await runner(ScriptedEngine(["hello"]))(prompt, trajectory_id)

    with pytest.raises(TimeoutError, match=r"2 of 6 episodes did not finish within 0.3 s: 7-1-1, 7-4-1 \(step-task"):
        collect(run, deadline_s=0.3)
    assert len(cancelled) == 2


def test_user_errors_cancel_the_rest() -> None:
    with pytest.raises(ValueError, match="max_prompt_length"):
        limits = EpisodeLimits(max_turns=1, max_prompt_length=2, max_response_length=5, max_model_len=9,
                               max_tool_response_length=9)
        collect(runner(ScriptedEngine(["hello"], delay_s=5.0), limits=limits))


def test_no_prompts_give_no_groups() -> None:
    assert collect(runner(ScriptedEngine(["hello"])), prompts=[]) == []
