"""What an episode counts beside its tokens: versions, step rewards, tool turns, invalid actions, the verdict."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from scripted import ScriptedEngine
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.rewards.environment import EnvironmentReward
from spear_megatron.rollout.engine import GenerateRequest, GenerateResult
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory
from test_agent_loop_episodes import ANSWER, FakeSandbox, call, play

BAD_CALL = "<tool_call>{oops}</tool_call>"


class Scripted:
    """Answers the k-th turn with the k-th result."""

    def __init__(self, *results: StepResult) -> None:
        self.results = list(results)

    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        return self.results.pop(0)

    async def close(self) -> None: ...


class ReturnsParts:
    def __init__(self, parts: RewardParts) -> None:
        self.parts = parts

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        self.seen = trajectory.reward
        return self.parts


def say(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def test_versions_are_kept_per_token_and_minus_one_elsewhere() -> None:
    engine = ScriptedEngine([])

    def with_versions(first: int) -> Any:
        def answer(request: GenerateRequest) -> GenerateResult:
            result = engine.say(request, call() if first == 4 else ANSWER)
            versions = tuple(first + (place > 1) for place in range(len(result.output_ids)))
            return dataclasses.replace(result, policy_versions=versions)

        return answer

    engine.script = [with_versions(4), with_versions(6)]
    trajectory = play([], engine=engine)
    (segment,) = trajectory.segments
    versions, mask = segment.policy_versions, segment.response_mask
    assert versions is not None and (versions[~mask] == -1).all()
    sampled = versions[mask].tolist()
    first_turn = sampled.index(6)
    assert sampled == [4, 4] + [5] * (first_turn - 2) + [6, 6] + [7] * (len(sampled) - first_turn - 2)
    assert trajectory.policy_version == 4


def test_versions_of_another_length_are_an_engine_failure() -> None:
    engine = ScriptedEngine([])
    engine.script = [lambda request: dataclasses.replace(engine.say(request, ANSWER), policy_versions=(1,))]
    trajectory = play([], engine=engine)
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and "policy versions" in (trajectory.error or "")


def test_rewards_and_invalid_actions_belong_to_their_segment() -> None:
    environment = Scripted(
        StepResult(messages=say("again"), reward=0.5, num_invalid_actions=1),
        StepResult(observation=Observation(say("new room"), observation_key="room"), reward=0.25, num_tool_calls=3),
        StepResult(done=True, reward=-1.0, num_tool_calls=1, num_invalid_actions=1, success=True),
    )
    trajectory = play(["a", "b", "c"], environment=environment, reward=EnvironmentReward())
    assert [segment.reward for segment in trajectory.segments] == [0.75, -1.0]
    assert [segment.num_invalid_actions for segment in trajectory.segments] == [1, 1]
    assert trajectory.num_invalid_actions == 2 and trajectory.num_tool_turns == 2
    assert trajectory.reward == RewardParts(
        outcome=-0.25, num_tool_calls=4, success=True, num_tool_turns=2, num_invalid_actions=2
    )


@pytest.mark.parametrize(
    "broken",
    [StepResult(messages=say("x"), reward=0.5, num_tool_calls=2, num_invalid_actions=1, error="the service is away"),
     StepResult(messages=say("x"), reward=float("nan"), num_tool_calls=2), StepResult(reward=0.5, num_tool_calls=2)],
    ids=["error", "reward", "nothing"],
)  # fmt: skip
def test_a_step_that_failed_counts_nothing(broken: StepResult) -> None:
    environment = Scripted(StepResult(messages=say("go on"), reward=0.25, num_tool_calls=1), broken)
    trajectory = play(["a", "b"], environment=environment, reward=EnvironmentReward())
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and trajectory.num_turns == 2
    assert (trajectory.num_tool_calls, trajectory.num_tool_turns, trajectory.num_invalid_actions) == (1, 1, 0)
    assert trajectory.reward.outcome == 0.25 and trajectory.segments[0].reward == 0.25


def test_environment_reward_scales_the_outcome_alone() -> None:
    def finished() -> Scripted:
        return Scripted(StepResult(done=True, reward=0.5, num_tool_calls=1, success=True))

    trajectory = play(["a"], environment=finished(), reward=EnvironmentReward(scale=10.0))
    assert trajectory.reward.outcome == 5.0 and trajectory.segments[0].reward == 0.5 and trajectory.reward.success
    for scale in (0, -1.0, float("inf"), float("nan"), True, "1"):
        with pytest.raises(ValueError, match="reward.kwargs.scale must be a positive number"):
            EnvironmentReward(scale=scale)  # type: ignore[arg-type]


def test_counts_stand_in_only_for_what_a_reward_left_at_zero() -> None:
    def episode(parts: RewardParts) -> tuple[RewardParts, RewardParts]:
        environment = Scripted(
            StepResult(messages=say("go on"), num_tool_calls=2),
            StepResult(messages=say("go on"), num_invalid_actions=1),
            StepResult(done=True),
        )
        reward = ReturnsParts(parts)
        trajectory = play(["a", "b", "c"], environment=environment, reward=reward)
        return trajectory.reward, reward.seen

    filled, seen = episode(RewardParts(outcome=0.5))
    assert (filled.num_tool_calls, filled.num_tool_turns, filled.num_invalid_actions) == (2, 1, 1)
    assert filled.outcome == 0.5 and not filled.success and seen.outcome == 0.0
    own, _ = episode(RewardParts(outcome=0.5, num_tool_calls=7, num_tool_turns=5, num_invalid_actions=3))
    assert (own.num_tool_calls, own.num_tool_turns, own.num_invalid_actions) == (7, 5, 3)


def test_code_interpreter_counts_turns_with_a_run_call_and_turns_without_one() -> None:
    trajectory = play([call() + call(), BAD_CALL, BAD_CALL + call(), ANSWER], sandbox=FakeSandbox())
    assert trajectory.stop_reason is StopReason.ANSWER
    assert (trajectory.num_tool_calls, trajectory.num_tool_failures, trajectory.num_tool_turns) == (3, 2, 2)
    assert trajectory.reward.num_invalid_actions == trajectory.segments[0].num_invalid_actions == 1
    assert trajectory.reward.num_tool_turns == 2 and trajectory.reward.success  # the mathematical reward's own verdict
