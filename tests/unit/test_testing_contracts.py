"""The contract checks pass what is sound and name what is broken; the example environment is sound."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_models import make_engine, tiny_model
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.data.prompts import load_prompts
from spear_megatron.environments.code_interpreter import CodeInterpreterEnvironment
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.environments.registry import environment_factory, needs_sandbox
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus
from spear_megatron.rewards.math import MathReward
from spear_megatron.rewards.registry import build_reward
from spear_megatron.rollout.engine import EngineError, GenerateRequest, GenerateResult
from spear_megatron.testing import ContractError, check_engine, check_environment, check_reward
from spear_megatron.types import Prompt, RewardParts, Trajectory

ROOT = Path(__file__).resolve().parents[2]
PROMPT = Prompt("p", ({"role": "user", "content": "What is 34 + 57?"},), answer="91")


class Sandbox:
    async def run(self, code: str) -> ExecutionResult:
        code.encode()
        return ExecutionResult(status=ExecutionStatus.OK, stdout="91\n")

    async def close(self) -> None: ...


@pytest.fixture()
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's configuration, loaded as a user does from the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return load(Config, "examples/custom_environment/config.yaml")


def test_code_interpreter_and_math_reward_keep_their_contracts() -> None:
    turns = ['<tool_call>{"name": "code_interpreter", "arguments": {"code": "print(91)"}}</tool_call>', "\\boxed{91}"]
    check_environment(lambda: CodeInterpreterEnvironment(sandbox=Sandbox()), PROMPT, turns=turns)
    reward = MathReward(num_workers=1)
    check_reward(reward, PROMPT, good=["\\boxed{91}", "\\boxed{091}"], bad=["\\boxed{90}", "91"])
    reward.close()


def test_example_is_named_in_the_yaml_and_sound(example: Any) -> None:
    assert not needs_sandbox(example.env)
    factory = environment_factory(example.env)
    train, val = load_prompts(example.data, "train"), load_prompts(example.data, "val")
    assert (len(train), len(val)) == (80, 20)
    check_environment(factory, train[40], turns=["<guess>50</guess>", "no", "<guess>52</guess>"])
    check_reward(build_reward(example.reward), train[0])
    source = ROOT / "examples" / "custom_environment" / "guess.py"
    assert len(source.read_text().splitlines()) < 100


def test_example_game_can_be_won(example: Any) -> None:
    async def bisect(prompt: Prompt) -> StepResult:
        environment = environment_factory(example.env)()
        observation: Observation | None = await environment.reset(prompt)
        while observation is not None:
            low, high = map(int, str(observation.observation_key).split("-"))
            step = await environment.step(Turn(f"<guess>{(low + high) // 2}</guess>", (), True))
            observation = step.observation
        return step

    for prompt in load_prompts(example.data, "train"):
        assert asyncio.run(bisect(prompt)).reward == 1.0


class GoodEnvironment:
    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(messages=prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        return StepResult(done=True)

    async def close(self) -> None: ...


COUNTER = itertools.count()
STEPS = {
    "must return a StepResult": None,
    "neither messages nor an observation": StepResult(),
    "exclude each other": StepResult(
        messages=({"role": "tool", "content": ""},), observation=Observation(PROMPT.messages)
    ),
    "infrastructure failure": StepResult(done=True, error="oops"),
    "role must be one of": StepResult(messages=({"role": "assistant", "content": ""},)),
    "content must be a string": StepResult(messages=({"role": "tool", "content": None},)),
    "messages must be a tuple": StepResult(messages=[{"role": "tool", "content": ""}]),  # type: ignore[arg-type]
    "num_tool_calls must be an integer": StepResult(done=True, num_tool_calls=1.5),  # type: ignore[arg-type]
    "reward must be a finite number": StepResult(done=True, reward=float("nan")),
    "is not an invalid action": StepResult(done=True, num_tool_calls=1, num_invalid_actions=1),
    "void goes with done": StepResult(messages=({"role": "tool", "content": ""},), void=True),
    "success goes with done": StepResult(messages=({"role": "tool", "content": ""},), success=True),
    "success must be true or false": StepResult(done=True, success=1),  # type: ignore[arg-type]
    "success and void exclude each other": StepResult(done=True, success=True, void=True),
    "num_invalid_actions must be an integer": StepResult(done=True, num_invalid_actions=-1),
    "must be JSON": StepResult(messages=({"role": "tool", "content": "\ud800"},)),
}


@pytest.mark.parametrize("message", STEPS)
def test_broken_steps_are_named(message: str) -> None:
    class Broken(GoodEnvironment):
        async def step(self, turn: Turn) -> Any:
            return STEPS[message]

    with pytest.raises(ContractError, match=message):
        check_environment(Broken, PROMPT)


def broken_environments() -> dict[str, type]:
    class Raises(GoodEnvironment):
        async def step(self, turn: Turn) -> StepResult:
            return StepResult(done=turn.tool_calls[0].error is None)

    class Hangs(GoodEnvironment):
        async def step(self, turn: Turn) -> StepResult:
            await asyncio.sleep(60)
            return StepResult(done=True)

    class Random(GoodEnvironment):
        async def reset(self, prompt: Prompt) -> Observation:
            return Observation(messages=({"role": "user", "content": str(next(COUNTER))},))

    class ClosesOnce(GoodEnvironment):
        closed = False

        async def close(self) -> None:
            assert not self.closed, "closed twice"
            self.closed = True

    class Incomplete:
        async def reset(self, prompt: Prompt) -> Observation:
            return Observation(messages=prompt.messages)

    class NeedsReset(GoodEnvironment):
        async def reset(self, prompt: Prompt) -> Observation:
            self.world = 1
            return Observation(messages=prompt.messages)

        async def close(self) -> None:
            self.world += 1

    class Empty(GoodEnvironment):
        async def reset(self, prompt: Prompt) -> Observation:
            return Observation(messages=())

    return {
        "raised IndexError": Raises, "did not finish within 0.2 s": Hangs, "differ at reset": Random,
        "a second close raised": ClosesOnce, "lacks one of": Incomplete, "close before reset raised": NeedsReset,
        "has no messages": Empty,
    }


@pytest.mark.parametrize("message", broken_environments())
def test_broken_environments_are_named(message: str) -> None:
    check_environment(GoodEnvironment, PROMPT)
    with pytest.raises(ContractError, match=message):
        check_environment(broken_environments()[message], PROMPT, deadline_s=0.2)


PARTS = {
    "must be RewardParts": 1.0,
    "outcome of .* must be a finite number": RewardParts(float("nan")),
    "penalty of .* must be a finite number": RewardParts(0.0, penalty="x"),  # type: ignore[arg-type]
    "success of .* must be a bool": RewardParts(0.0, success=1),  # type: ignore[arg-type]
    "num_tool_calls of .* must be an integer": RewardParts(0.0, num_tool_calls=-1),
    "num_tool_turns of .* must be an integer": RewardParts(0.0, num_tool_turns=0.5),  # type: ignore[arg-type]
    "num_invalid_actions of .* must be an integer": RewardParts(0.0, num_invalid_actions=-1),
    "good example 0 has success=False": RewardParts(1.0),
    "bad example 0 has success=True": RewardParts(1.0, success=True),
}


@pytest.mark.parametrize("message", PARTS)
def test_broken_rewards_are_named(message: str) -> None:
    async def reward(prompt: Prompt, trajectory: Trajectory) -> Any:
        return PARTS[message]

    with pytest.raises(ContractError, match=message):
        check_reward(reward, PROMPT, good=["yes"], bad=["no"])


def test_raising_and_unsteady_rewards_are_named() -> None:
    async def raises(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        return RewardParts(float(trajectory.messages[1]["content"]))

    async def unsteady(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        return RewardParts(float(next(COUNTER)))

    async def unfair(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        return RewardParts(0.0, success=trajectory.messages[-1]["content"] == "yes")

    with pytest.raises(ContractError, match="without model turns raised IndexError"):
        check_reward(raises, PROMPT)
    with pytest.raises(ContractError, match="not reproducible"):
        check_reward(unsteady, PROMPT)
    with pytest.raises(ContractError, match="not above"):
        check_reward(unfair, PROMPT, good=["yes"], bad=["no"])


def test_embedded_engine_keeps_the_contract() -> None:
    model, shape = tiny_model("qwen3-tied")
    check_engine(lambda: make_engine(model, shape), prompt_ids=[5, 9, 13, 2], vocab_size=shape.vocab_size)


class HashEngine:
    """A sound toy: tokens are a hash of noise key and position. Subclasses break one rule."""

    closed = False

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        sampling = request.sampling
        if self.closed:
            raise EngineError("closed")
        if not request.input_ids or not all(0 <= i < 50 for i in request.input_ids):
            raise ValueError("input_ids")
        if sampling.max_new_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
            raise ValueError("sampling")
        ids: list[int] = []
        while len(ids) < sampling.max_new_tokens and not (ids and ids[-1] in sampling.stop_token_ids):
            key = request.noise_key if sampling.temperature else 0
            ids.append(hash((key, len(request.input_ids) + len(ids))) % 50)
        reason = "stop" if ids[-1] in sampling.stop_token_ids else "length"
        return self.spoil(request, GenerateResult(tuple(ids), (-1.0,) * len(ids), reason, (1,) * len(ids)))

    def spoil(self, request: GenerateRequest, result: GenerateResult) -> Any:
        return result

    def update_weights(self, named_tensors: object, version: int) -> None: ...

    async def close(self) -> None:
        self.closed = True


SPOILS: dict[str, Any] = {
    "expected a GenerateResult": lambda q, r: None,
    "tokens but": lambda q, r: dataclasses.replace(r, log_probs=r.log_probs[1:]),
    "log-prob above 0": lambda q, r: dataclasses.replace(r, log_probs=(1.0,) * len(r.output_ids)),
    "outside the vocabulary": lambda q, r: dataclasses.replace(r, output_ids=(50,) * len(r.output_ids)),
    "finish_reason 'stop' must go with": lambda q, r: dataclasses.replace(r, finish_reason="stop"),
    "finish_reason 'abort'": lambda q, r: dataclasses.replace(r, finish_reason="abort"),
    "policy versions for": lambda q, r: dataclasses.replace(r, policy_versions=(1,)),
    "other log-probs among others": lambda q, r: dataclasses.replace(
        r, log_probs=(-float(next(COUNTER)),) * len(r.log_probs)
    ),
    "other tokens the second time": lambda q, r: (
        dataclasses.replace(r, output_ids=r.output_ids[::-1]) if q.request_id == "again" else r
    ),
    "expected .*the stop token must be kept": lambda q, r: dataclasses.replace(
        r, output_ids=(next(COUNTER) % 50, *r.output_ids[1:])
    ),
    "gave the same tokens": lambda q, r: (
        dataclasses.replace(r, output_ids=tuple(hash((1, 3 + i)) % 50 for i in range(12)))
        if q.request_id.startswith("key")
        else r
    ),
}


@pytest.mark.parametrize("message", SPOILS)
def test_broken_engines_are_named(message: str) -> None:
    class Broken(HashEngine):
        def spoil(self, request: GenerateRequest, result: GenerateResult) -> Any:
            return SPOILS[message](request, result)

    check_engine(HashEngine, prompt_ids=[1, 2, 3], vocab_size=50)
    with pytest.raises(ContractError, match=message):
        check_engine(Broken, prompt_ids=[1, 2, 3], vocab_size=50)


def test_engines_that_serve_too_much_are_named() -> None:
    class Lax(HashEngine):
        async def generate(self, request: GenerateRequest) -> GenerateResult:
            ids = tuple(i % 50 for i in request.input_ids) or (1,)
            return await super().generate(dataclasses.replace(request, input_ids=ids))

    class Immortal(HashEngine):
        async def close(self) -> None: ...

    with pytest.raises(ContractError, match="an empty prompt must raise ValueError, it was served"):
        check_engine(Lax, prompt_ids=[1, 2, 3], vocab_size=50)
    with pytest.raises(ContractError, match="a request after close must raise EngineError, it was served"):
        check_engine(Immortal, prompt_ids=[1, 2, 3], vocab_size=50)
