"""Rewards and environments by name, with one clear sentence for what cannot be resolved."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from spear_megatron.environments.code_interpreter import CodeInterpreterEnvironment
from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.environments.grid_world import GridWorldEnvironment
from spear_megatron.environments.registry import environment_factory, needs_sandbox, opening_of
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus
from spear_megatron.rewards.environment import EnvironmentReward
from spear_megatron.rewards.math import MathReward
from spear_megatron.rewards.registry import RewardConfig, build_reward
from spear_megatron.testing import check_reward
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory, TrajectoryId


class EchoEnvironment:
    def __init__(self, *, times: int = 1) -> None:
        self.times = times


class Nested:
    class Reward:
        def __init__(self, *, scale: float) -> None:
            self.scale = scale

        async def __call__(self, prompt: object, trajectory: object) -> object: ...


class Sandbox:
    async def run(self, code: str) -> ExecutionResult:
        return ExecutionResult(status=ExecutionStatus.OK)

    async def close(self) -> None: ...


HERE = __name__
NOT_CALLABLE = 3


def test_builtin_names() -> None:
    assert isinstance(build_reward(RewardConfig(kwargs={"wrong": -1.0})), MathReward)
    assert isinstance(build_reward(RewardConfig(name="environment")), EnvironmentReward)
    assert needs_sandbox(EnvironmentConfig())
    factory = environment_factory(EnvironmentConfig(kwargs={"max_calls_per_turn": 1}), Sandbox())
    first, second = factory(), factory()
    assert isinstance(first, CodeInterpreterEnvironment) and first is not second
    assert isinstance(build_reward(RewardConfig(name="environment", kwargs={"scale": 2.0})), EnvironmentReward)
    grid = EnvironmentConfig(name="grid_world", kwargs={"max_steps": 3})
    assert not needs_sandbox(grid) and isinstance(environment_factory(grid)(), GridWorldEnvironment)
    assert opening_of(grid) is GridWorldEnvironment.opening


def test_the_environment_s_own_score_is_scaled_and_otherwise_passed_on() -> None:
    parts = RewardParts(0.5, num_tool_calls=3, success=True, num_tool_turns=2, num_invalid_actions=1)
    trajectory = Trajectory(TrajectoryId(1, 0, 0), (), parts, StopReason.ANSWER, 0)
    reward = build_reward(RewardConfig(name="environment", kwargs={"scale": 10.0}))
    assert asyncio.run(reward(Prompt("p", ()), trajectory)) == dataclasses.replace(parts, outcome=5.0)
    check_reward(EnvironmentReward(), Prompt("p", ()))
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="reward.kwargs.scale must be a positive"):
            EnvironmentReward(scale=scale)


def test_names_of_the_user() -> None:
    config = EnvironmentConfig(name=f"{HERE}:EchoEnvironment", kwargs={"times": 4})
    assert not needs_sandbox(config)
    assert environment_factory(config)().times == 4
    assert build_reward(RewardConfig(name=f"{HERE}:Nested.Reward", kwargs={"scale": 2.0})).scale == 2.0


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mth", {}, "reward.name 'mth' is not known: did you mean 'math'?"),
        ("zzzzzz", {}, "use one of math, environment or 'module:attribute'"),
        ("nowhere_at_all:Thing", {}, "cannot import 'nowhere_at_all'.*PYTHONPATH"),
        ("./mine/scores.py:Thing", {}, "path of a file: write 'scores:Thing' and put the file's folder on PYTHONPATH"),
        ("scores.py:Thing", {}, "path of a file: write 'scores:Thing'"),
        (".scores:Thing", {}, "cannot import '.scores'"),
        (f"{HERE}:Missing", {}, "has no attribute 'Missing'"),
        (f"{HERE}:NOT_CALLABLE", {}, "must be a class or a function"),
        ("environmnt", {}, "reward.name 'environmnt' is not known: did you mean 'environment'?"),
        ("environment", {"scale": 0}, "reward.kwargs.scale must be a positive number"),
        ("math", {"corect": 1}, "reward.kwargs do not fit MathReward.*corect"),
        (f"{HERE}:Nested.Reward", {}, "reward.kwargs do not fit Nested.Reward.*scale"),
        (f"{HERE}:EchoEnvironment", {}, "makes a EchoEnvironment, which cannot be called"),
    ],
)
def test_unusable_names_say_what_to_do(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reward(RewardConfig(name=name, kwargs=kwargs))


def test_environment_errors_name_their_section() -> None:
    with pytest.raises(ValueError, match="env.name 'code_interpretr' is not known: did you mean 'code_interpreter'"):
        environment_factory(EnvironmentConfig(name="code_interpretr"))
    with pytest.raises(ValueError, match="needs a sandbox"):
        environment_factory(EnvironmentConfig())
    with pytest.raises(ValueError, match="env.kwargs do not fit"):
        environment_factory(EnvironmentConfig(kwargs={"x": 1}), Sandbox())
    with pytest.raises(ValueError, match="env.kwargs.max_calls_per_turn"):
        environment_factory(EnvironmentConfig(kwargs={"max_calls_per_turn": 0}), Sandbox())()
    with pytest.raises(ValueError, match="env.name is empty"):
        EnvironmentConfig(name="")
    with pytest.raises(ValueError, match="reward.name is empty"):
        RewardConfig(name="")
    asyncio.run(Sandbox().close())
