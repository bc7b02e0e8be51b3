"""Episodes against a scripted engine: every stop reason, and ids, mask and log-probs that belong together."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from scripted import ScriptedEngine, log_prob_of, tiny_renderer
from spear_megatron.environments.code_interpreter import TOOL_SCHEMA, CodeInterpreterEnvironment
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus, infrastructure
from spear_megatron.rewards.math import MathReward
from spear_megatron.rollout.agent_loop import EpisodeLimits, run_episode, truncate_middle
from spear_megatron.rollout.engine import EngineError, GenerateResult, SamplingParams
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory, TrajectoryId

PROMPT = Prompt("sum", ({"role": "user", "content": "What is 34 + 57?"},), answer="91")
ID = TrajectoryId(2, 5, 1)
LIMITS = {
    "max_turns": 4, "max_prompt_length": 64, "max_response_length": 400, "max_model_len": 464,
    "max_tool_response_length": 200,
}
ANSWER = "\\boxed{91}"


def call(code: str = "print(34 + 57)") -> str:
    return f"<tool_call>\n{json.dumps({'name': 'code_interpreter', 'arguments': {'code': code}})}\n</tool_call>"


class FakeSandbox:
    """Returns one result for every program and keeps the programs."""

    def __init__(self, result: ExecutionResult | None = None) -> None:
        self.result = result or ExecutionResult(status=ExecutionStatus.OK, stdout="91\n")
        self.codes: list[str] = []

    async def run(self, code: str) -> ExecutionResult:
        self.codes.append(code)
        return self.result

    async def close(self) -> None: ...


class Recorded:
    """An environment around another one that counts its closings."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.num_closed = 0

    async def reset(self, prompt: Prompt) -> Observation:
        return await self.inner.reset(prompt)

    async def step(self, turn: Turn) -> StepResult:
        return await self.inner.step(turn)

    async def close(self) -> None:
        self.num_closed += 1
        await self.inner.close()


def play(script: list, *, sandbox: FakeSandbox | None = None, environment: Any = None, reward: Any = None,
         engine: ScriptedEngine | None = None, max_new_tokens: int = 1000, **limits: int) -> Trajectory:
    inner = environment or CodeInterpreterEnvironment(sandbox=sandbox or FakeSandbox())
    recorded = Recorded(inner)
    try:
        return asyncio.run(
            run_episode(
                engine=engine or ScriptedEngine(script),
                renderer=tiny_renderer(),
                environment=recorded,
                reward=reward or MathReward(),
                prompt=PROMPT,
                trajectory_id=ID,
                noise_key=77,
                limits=EpisodeLimits(**{**LIMITS, **limits}),
                sampling=SamplingParams(max_new_tokens=max_new_tokens),
            )
        )
    finally:
        assert recorded.num_closed == 1


def check_alignment(trajectory: Trajectory) -> None:
    for segment in trajectory.segments:
        n = len(segment.ids)
        assert segment.ids.dtype == torch.int32 and segment.response_mask.dtype == torch.bool
        assert segment.rollout_log_probs.dtype == torch.float32
        assert segment.response_mask.shape == segment.rollout_log_probs.shape == (n,)
        expected = [log_prob_of(t) if segment.response_mask[t] else 0.0 for t in range(n)]
        assert torch.allclose(segment.rollout_log_probs, torch.tensor(expected))


def test_call_and_answer() -> None:
    sandbox = FakeSandbox()
    trajectory = play([call(), ANSWER], sandbox=sandbox)
    assert trajectory.stop_reason is StopReason.ANSWER and trajectory.valid and trajectory.error is None
    assert (trajectory.num_turns, trajectory.num_tool_calls, trajectory.num_tool_failures) == (2, 1, 0)
    assert trajectory.reward.success and trajectory.reward.outcome == 1.0 and trajectory.reward.num_tool_calls == 1
    assert trajectory.policy_version == 3 and trajectory.id == ID
    assert sandbox.codes == ["print(34 + 57)"]
    check_alignment(trajectory)
    messages = [
        *PROMPT.messages,
        {"role": "assistant", "content": call()},
        {"role": "tool", "name": "code_interpreter", "content": "91"},
        {"role": "assistant", "content": ANSWER},
    ]
    assert list(trajectory.messages) == messages
    ids, mask = tiny_renderer().conversation(messages, [TOOL_SCHEMA])
    (segment,) = trajectory.segments
    assert segment.ids.tolist() == ids[:-1]  # the template ends with a line break after the last turn
    assert segment.response_mask.tolist() == mask[:-1]


def test_requests_carry_the_exact_context() -> None:
    engine = ScriptedEngine([call(), call("print(2)"), ANSWER])
    trajectory = play([], engine=engine)
    ids = trajectory.segments[0].ids.tolist()
    for request in engine.requests:
        assert list(request.input_ids) == ids[: len(request.input_ids)]
        assert request.noise_key == 77
        used = len(request.input_ids) - len(engine.requests[0].input_ids)
        assert request.sampling.max_new_tokens == LIMITS["max_response_length"] - used
        assert request.sampling.stop_token_ids == tiny_renderer().stop_token_ids
    assert [request.request_id for request in engine.requests] == ["2-5-1/0/0", "2-5-1/0/1", "2-5-1/0/2"]


def test_wrong_answer_is_scored() -> None:
    trajectory = play(["\\boxed{90}"], reward=MathReward(wrong=-1.0))
    assert trajectory.stop_reason is StopReason.ANSWER
    assert trajectory.reward.outcome == -1.0 and not trajectory.reward.success


@pytest.mark.parametrize("text", ["", "I do not know.", "\\boxed{91"])
def test_void_turn(text: str) -> None:
    trajectory = play([text])
    assert trajectory.stop_reason is StopReason.VOID_TURN and trajectory.reward.outcome == 0.0
    check_alignment(trajectory)


def test_turn_limit_runs_the_last_call_but_inserts_nothing() -> None:
    sandbox = FakeSandbox()
    trajectory = play([call()], sandbox=sandbox, max_turns=2)
    assert trajectory.stop_reason is StopReason.TURN_LIMIT
    assert (trajectory.num_turns, len(sandbox.codes)) == (2, 2)
    assert trajectory.segments[0].response_mask[-1] and trajectory.messages[-1]["role"] == "assistant"


def test_length_inside_a_turn() -> None:
    trajectory = play([call(), ANSWER], max_response_length=10)
    (segment,) = trajectory.segments
    assert trajectory.stop_reason is StopReason.LENGTH
    assert len(segment.ids) - segment.prompt_length == 10 == trajectory.num_response_tokens
    check_alignment(trajectory)


def test_length_by_the_context_and_by_the_turn() -> None:
    prompt = len(play([ANSWER]).segments[0].ids[: play([ANSWER]).segments[0].prompt_length])
    assert len(play([call()], max_model_len=prompt + 7).segments[0].ids) == prompt + 7
    trajectory = play([call()], max_new_tokens=3)
    assert trajectory.stop_reason is StopReason.LENGTH and trajectory.num_response_tokens == 3
    assert play([call()], max_model_len=prompt).stop_reason is StopReason.LENGTH


@pytest.mark.parametrize("key", ["max_response_length", "max_model_len"])
def test_tool_overflow_at_the_exact_limit(key: str) -> None:
    """The response must leave room for at least one more token: one token decides."""
    whole = play([call(), ANSWER])
    (segment,) = whole.segments
    answer_length = len(tiny_renderer().tokenizer.encode(ANSWER)) + 1
    total = len(segment.ids) - answer_length  # up to and with the second generation prompt
    limit = total - (segment.prompt_length if key == "max_response_length" else 0)
    overflow = play([call(), ANSWER], **{key: limit})
    assert overflow.stop_reason is StopReason.TOOL_OVERFLOW
    assert overflow.segments[0].response_mask[-1]
    assert overflow.num_tool_calls == 1 and overflow.messages[-1]["role"] == "assistant"
    assert play([call(), ANSWER], **{key: limit + 1}).stop_reason is StopReason.LENGTH
    assert play([call(), ANSWER], **{key: limit + answer_length}).stop_reason is StopReason.ANSWER


def test_tool_output_is_cut_in_the_middle() -> None:
    sandbox = FakeSandbox(ExecutionResult(status=ExecutionStatus.OK, stdout="a" * 5000 + "z"))
    trajectory = play([call(), ANSWER], sandbox=sandbox, max_tool_response_length=60)
    content = trajectory.messages[2]["content"]
    assert len(content) == 60 and content.startswith("aaa") and content.endswith("az") and "truncated" in content


@pytest.mark.parametrize("limit", [1, 5, 19, 20, 21, 22, 50, 99, 100])
def test_truncation_keeps_the_limit(limit: int) -> None:
    text = "".join(chr(33 + i % 90) for i in range(100))
    cut = truncate_middle(text, limit)
    assert len(cut) == limit and text[0] == cut[0]
    assert limit < 22 or cut[-1] == text[-1]


@pytest.mark.parametrize(
    "entry",
    [
        EngineError("the engine fell over"),
        lambda request: GenerateResult((5,), (-1.0,), "abort"),
        lambda request: GenerateResult((5, 6), (-1.0,), "stop"),
    ],
    ids=["error", "abort", "protocol"],
)
def test_engine_failure_is_infrastructure(entry: object) -> None:
    trajectory = play([call(), entry])
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and not trajectory.valid
    assert trajectory.error is not None and trajectory.error.startswith("engine: ")
    assert trajectory.num_turns == 1 and trajectory.num_response_tokens > 0  # kept for viewing
    check_alignment(trajectory)


def test_engine_value_errors_are_not_swallowed() -> None:
    with pytest.raises(ValueError, match="never"):
        play([ValueError("never serves this")])


def test_sandbox_failure_is_infrastructure() -> None:
    trajectory = play([call()], sandbox=FakeSandbox(infrastructure("server gone")))
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and trajectory.error == "sandbox: server gone"


class Broken:
    """An environment or reward that raises where told."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _maybe(self, here: str) -> None:
        if self.where == here:
            raise KeyError("boom")

    async def reset(self, prompt: Prompt) -> Observation:
        self._maybe("reset")
        return Observation(messages=prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        self._maybe("step")
        return StepResult() if self.where == "silent" else StepResult(done=True)

    async def close(self) -> None:
        self._maybe("close")

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> Any:
        raise RuntimeError("scorer down")


@pytest.mark.parametrize("where", ["reset", "step", "silent"])
def test_environment_failure_is_infrastructure(where: str) -> None:
    trajectory = play([ANSWER], environment=Broken(where))
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE
    assert trajectory.error is not None and trajectory.error.startswith("environment ")
    if where != "silent":
        assert "KeyError" in trajectory.error and "test_agent_loop_episodes.py:" in trajectory.error


def test_reward_failure_is_infrastructure() -> None:
    trajectory = play([ANSWER], reward=Broken(""))
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and "scorer down" in str(trajectory.error)


async def nan_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
    return RewardParts(outcome=float("nan"))


async def number_reward(prompt: Prompt, trajectory: Trajectory) -> float:
    return 1.0


def plain_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (nan_reward, "reward: outcome nan and penalty 0.0 must be finite"),
        (number_reward, "reward: it must return RewardParts, not float"),
        (plain_reward, "reward: KeyError: 'answer' (test_agent_loop_episodes.py:"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(reward: Any, words: str) -> None:
    trajectory = play([ANSWER], reward=reward)
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and words in str(trajectory.error)


def test_rewards_are_kept_as_plain_numbers() -> None:
    async def tensors(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        return RewardParts(outcome=torch.tensor(0.5), penalty=torch.tensor(-0.25), success=torch.tensor(True))

    reward = play([ANSWER], reward=tensors).reward
    assert reward == RewardParts(0.5, 0, -0.25, True)
    assert json.dumps([reward.outcome, reward.penalty, reward.success]) == "[0.5, -0.25, true]"


def test_an_environment_that_breaks_its_contract_is_named() -> None:
    class Forgetful(CodeInterpreterEnvironment):
        async def step(self, turn: Turn) -> Any:
            return None

    trajectory = play([ANSWER], environment=Forgetful(sandbox=FakeSandbox()))
    assert trajectory.error == "environment step: it must return StepResult, not NoneType"


def test_failing_close_is_reported_and_not_scored(caplog: pytest.LogCaptureFixture) -> None:
    assert play([ANSWER], environment=Broken("close")).stop_reason is StopReason.ANSWER
    assert "closing the environment of 2-5-1 failed" in caplog.text


def test_overlong_prompt_names_the_key() -> None:
    with pytest.raises(ValueError, match="'sum' has 29 tokens, more than data.max_prompt_length=20"):
        play([ANSWER], max_prompt_length=20)


def test_other_stop_token_is_closed_before_the_tool_response() -> None:
    """A turn that ended with <|endoftext|> keeps it and gets its <|im_end|> inserted, unmasked."""
    engine = ScriptedEngine([])
    engine.script = [lambda request: engine.say(request, call() + "<|endoftext|>", end=False), ANSWER]
    trajectory = play([], engine=engine)
    (segment,) = trajectory.segments
    renderer = tiny_renderer()
    stop = segment.ids.tolist().index(renderer.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    assert segment.response_mask[stop] and segment.ids[stop + 1] == renderer.turn_end_id
    assert not segment.response_mask[stop + 1] and trajectory.stop_reason is StopReason.ANSWER


class Steps:
    """Three observations, each its own segment; the environment rewards every turn."""

    def __init__(self, long: bool = False) -> None:
        self.turns: list[Turn] = []
        self.long = long

    def _observation(self) -> Observation:
        text = f"state {len(self.turns)}" + " long" * (100 if self.long and self.turns else 0)
        return Observation(messages=({"role": "user", "content": text},), observation_key=f"key {len(self.turns)}")

    async def reset(self, prompt: Prompt) -> Observation:
        return self._observation()

    async def step(self, turn: Turn) -> StepResult:
        self.turns.append(turn)
        if len(self.turns) == 3:
            return StepResult(done=True, reward=0.5)
        return StepResult(observation=self._observation(), reward=0.25)

    async def close(self) -> None: ...


class OwnReward:
    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> Any:
        return trajectory.reward


def test_observations_open_segments() -> None:
    engine = ScriptedEngine(["go left", "go right", "stop"])
    trajectory = play([], engine=engine, environment=Steps(), reward=OwnReward(), max_response_length=12)
    assert [segment.observation_key for segment in trajectory.segments] == ["key 0", "key 1", "key 2"]
    assert trajectory.stop_reason is StopReason.ANSWER and trajectory.reward.outcome == 1.0
    renderer = tiny_renderer()
    for index, (segment, text) in enumerate(zip(trajectory.segments, ["go left", "go right", "stop"], strict=True)):
        prompt = renderer.prompt_ids([{"role": "user", "content": f"state {index}"}])
        assert segment.ids[: segment.prompt_length].tolist() == prompt
        assert renderer.decode(segment.ids[segment.prompt_length :].tolist()) == text + "<|im_end|>"
    check_alignment(trajectory)
    assert len({request.noise_key for request in engine.requests}) == 3  # positions start again, noise does not


def test_later_segment_that_does_not_fit_ends_by_length() -> None:
    trajectory = play(["go"], environment=Steps(long=True), reward=OwnReward())
    assert trajectory.stop_reason is StopReason.LENGTH and len(trajectory.segments) == 1
    assert trajectory.messages[-1] == {"role": "assistant", "content": "go"}


def test_limits_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="max_turns must be at least 1"):
        EpisodeLimits(**{**LIMITS, "max_turns": 0})
