"""What an episode records beside its tokens: versions, rewards and invalid actions per segment, counts, the verdict."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scripted import ScriptedEngine, tiny_renderer
from spear_megatron.data.tool_calls import parse_turn
from spear_megatron.environments.code_interpreter import CodeInterpreterEnvironment
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus
from spear_megatron.rewards.environment import EnvironmentReward
from spear_megatron.rollout.agent_loop import EpisodeLimits, run_episode
from spear_megatron.rollout.engine import GenerateRequest, GenerateResult, SamplingParams
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory, TrajectoryId

PROMPT = Prompt("task", ({"role": "user", "content": "go"},), answer="1")
TOOL = ({"role": "tool", "content": "seen"},)


def state(index: int) -> Observation:
    return Observation(({"role": "user", "content": f"state {index}"},), observation_key=f"key {index}")


class Played:
    """Answers the k-th turn with the k-th step."""

    def __init__(self, steps: Sequence[StepResult]) -> None:
        self.steps = list(steps)

    async def reset(self, prompt: Prompt) -> Observation:
        return state(0)

    async def step(self, turn: Turn) -> StepResult:
        return self.steps.pop(0)

    async def close(self) -> None: ...


class Seen:
    """A reward that keeps the trajectory it is shown and returns given parts."""

    def __init__(self, parts: RewardParts) -> None:
        self.parts = parts
        self.trajectory: Any = None

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        self.trajectory = trajectory
        return self.parts


def play(steps: Sequence[StepResult], *, engine: ScriptedEngine | None = None, reward: Any = None,
         max_turns: int = 50, max_response_length: int = 60) -> Trajectory:
    return asyncio.run(
        run_episode(
            engine=engine or ScriptedEngine(["go"]), renderer=tiny_renderer(), environment=Played(steps),
            reward=reward or EnvironmentReward(), prompt=PROMPT, trajectory_id=TrajectoryId(1, 2, 3), noise_key=5,
            limits=EpisodeLimits(
                max_turns=max_turns, max_prompt_length=40, max_response_length=max_response_length,
                max_model_len=100, max_tool_response_length=50,
            ),
            sampling=SamplingParams(max_new_tokens=60),
        )
    )  # fmt: skip


# Two turns in the first segment, one in the second, two in the third; turns with 2, 0, 1, 0 and 1 calls.
STEPS = (
    StepResult(messages=TOOL, reward=0.25, num_tool_calls=2, num_tool_failures=1),
    StepResult(observation=state(1), reward=0.5, num_invalid_actions=1, num_tool_failures=1),
    StepResult(observation=state(2), reward=-1.0, num_tool_calls=1),
    StepResult(messages=TOOL, num_invalid_actions=1),
    StepResult(done=True, reward=4.0, num_tool_calls=1, success=True),
)


def test_rewards_and_invalid_actions_belong_to_the_segment_of_their_turn() -> None:
    reward = Seen(RewardParts(7.0))
    trajectory = play(STEPS, reward=reward)
    assert [segment.reward for segment in trajectory.segments] == [0.75, -1.0, 4.0]
    assert [segment.num_invalid_actions for segment in trajectory.segments] == [1, 0, 1]
    assert (trajectory.num_turns, trajectory.num_tool_calls, trajectory.num_tool_turns) == (5, 4, 3)
    assert trajectory.num_invalid_actions == 2 and trajectory.num_tool_failures == 2
    own = RewardParts(3.75, num_tool_calls=4, success=True, num_tool_turns=3, num_invalid_actions=2)
    assert reward.trajectory.reward == own
    assert play(STEPS).reward == own  # what the reward 'environment' passes on


def test_counts_that_the_reward_leaves_out_are_filled_in_and_others_kept() -> None:
    plain = play(STEPS, reward=Seen(RewardParts(7.0))).reward
    assert plain == RewardParts(7.0, num_tool_calls=4, num_tool_turns=3, num_invalid_actions=2)
    own = RewardParts(1.0, num_tool_calls=9, penalty=-0.5, num_tool_turns=8, num_invalid_actions=7)
    assert play(STEPS, reward=Seen(own)).reward == own


def test_the_verdict_is_that_of_the_last_step() -> None:
    assert not play([StepResult(done=True, reward=1.0)]).reward.success
    limited = play(STEPS, max_turns=4)  # the turn limit ends it before the environment does
    assert limited.stop_reason is StopReason.TURN_LIMIT and not limited.reward.success
    assert [segment.reward for segment in limited.segments] == [0.75, -1.0, 0.0]


def test_a_turn_cut_by_a_limit_was_not_acted_on() -> None:
    trajectory = play(STEPS, max_response_length=1)
    assert trajectory.stop_reason is StopReason.LENGTH
    assert (trajectory.reward.outcome, trajectory.num_invalid_actions, trajectory.num_tool_turns) == (0.0, 0, 0)


def test_versions_lie_on_the_sampled_tokens() -> None:
    engine = ScriptedEngine([])

    def say(request: GenerateRequest) -> GenerateResult:
        engine.version += 1  # new weights before every turn
        return engine.say(request, "go")

    engine.script = [say]
    trajectory = play(STEPS, engine=engine)
    turn = len(tiny_renderer().tokenizer.encode("go")) + 1
    expected = ([4] * turn + [5] * turn, [6] * turn, [7] * turn + [8] * turn)
    for segment, versions in zip(trajectory.segments, expected, strict=True):
        assert segment.policy_versions is not None and segment.policy_versions.dtype == torch.int32
        assert segment.policy_versions[segment.response_mask].tolist() == versions
        assert (segment.policy_versions[~segment.response_mask] == -1).all()
    assert trajectory.policy_version == 4


def test_versions_that_an_engine_does_not_tell_are_unknown() -> None:
    engine = ScriptedEngine([])
    untold = lambda request: dataclasses.replace(engine.say(request, "go"), policy_versions=())  # noqa: E731
    engine.script = ["go", untold, "go", "go", "go"]
    known = [segment.policy_versions is not None for segment in play(STEPS, engine=engine).segments]
    assert known == [False, True, True]
    engine.script = [lambda request: dataclasses.replace(engine.say(request, "go"), policy_versions=(1,))]
    trajectory = play(STEPS, engine=engine)
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and "1 policy versions" in str(trajectory.error)


@pytest.mark.parametrize(("reward", "words"), [(float("nan"), "must be finite, got nan"), ("x", "must be a number")])
def test_a_step_reward_that_is_no_number_is_named(reward: Any, words: str) -> None:
    trajectory = play([StepResult(done=True, reward=reward)])
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and words in str(trajectory.error)


def test_many_segments_keep_their_own_noise_and_limits() -> None:
    """Lengths bound a segment, turns the episode; the noise of no two segments is the same."""
    engine = ScriptedEngine(["go"])
    steps = [*(StepResult(observation=state(index)) for index in range(1, 60)), StepResult(done=True)]
    trajectory = play(steps, engine=engine, max_turns=60, max_response_length=8)
    assert len(trajectory.segments) == trajectory.num_turns == 60 and trajectory.stop_reason is StopReason.ANSWER
    assert len({request.noise_key for request in engine.requests}) == 60
    assert {request.sampling.max_new_tokens for request in engine.requests} == {8}
    assert play(steps, max_turns=59).stop_reason is StopReason.TURN_LIMIT


GOOD_CALL = '<tool_call>{"name": "code_interpreter", "arguments": {"code": "1"}}</tool_call>'
BAD_CALLS = '<tool_call>{oops}</tool_call><tool_call>{"name": "other", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "invalid"), [(GOOD_CALL, 0), (BAD_CALLS, 1), (BAD_CALLS + GOOD_CALL, 0), ("\\boxed{1}", 0)]
)
def test_code_interpreter_turns_of_which_nothing_could_run_are_invalid(text: str, invalid: int) -> None:
    class Sandbox:
        async def run(self, code: str) -> ExecutionResult:
            return ExecutionResult(status=ExecutionStatus.ERROR, stderr="a program that fails is a valid action")

        async def close(self) -> None: ...

    step = asyncio.run(CodeInterpreterEnvironment(sandbox=Sandbox()).step(parse_turn(text, finished=True)))
    assert step.num_invalid_actions == invalid
