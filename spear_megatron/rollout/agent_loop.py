"""One episode: the policy and an environment talk, token in token out, until an explicit stop reason.

What the policy sampled stays as it is; what is inserted between turns is the chat template's own text. Ids, response
mask and log-probs grow together. An environment that rebuilds the prompt opens a new segment of the same trajectory.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from spear_megatron.data.chat import ChatRenderer
from spear_megatron.data.tool_calls import parse_turn
from spear_megatron.environments.protocol import Environment, Observation, Reward, StepResult
from spear_megatron.parallel.seeds import derive_key
from spear_megatron.rollout.engine import Engine, EngineError, GenerateRequest, GenerateResult, SamplingParams
from spear_megatron.types import Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_CUT = "\n...(truncated)...\n"


@dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """Bounds of one episode.

    ``max_turns`` counts model turns. Lengths count tokens of one segment: ``max_prompt_length`` before its first model
    turn, ``max_response_length`` after it (model and inserted tokens), ``max_model_len`` in all.
    ``max_tool_response_length`` counts characters of one tool message, which is cut in the middle.
    """

    max_turns: int
    max_prompt_length: int
    max_response_length: int
    max_model_len: int
    max_tool_response_length: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")


async def run_episode(
    *,
    engine: Engine,
    renderer: ChatRenderer,
    environment: Environment,
    reward: Reward,
    prompt: Prompt,
    trajectory_id: TrajectoryId,
    noise_key: int,
    limits: EpisodeLimits,
    sampling: SamplingParams,
) -> Trajectory:
    """Play one episode, close its ``environment``, and score it.

    A failing engine, environment or reward gives a trajectory with ``StopReason.INFRASTRUCTURE`` and ``error`` set; it
    keeps what was sampled, for viewing. Equal arguments and weights give the same tokens: sampling noise depends on
    ``noise_key``, the segment and the token position. ``sampling.max_new_tokens`` bounds one turn; a turn that it or
    another limit cuts ends the episode.

    Raises:
        ValueError: the prompt is longer than ``max_prompt_length``, or the engine can never serve the request.
    """
    episode = _Episode(engine, renderer, environment, prompt, trajectory_id, noise_key, limits, sampling)
    error: str | None = None
    try:
        stop_reason = await episode.play()
    except _InfrastructureError as failure:
        stop_reason, error = StopReason.INFRASTRUCTURE, str(failure)
    finally:
        await _close(environment, trajectory_id)
    trajectory = episode.trajectory(stop_reason, error)
    if not trajectory.valid:
        return trajectory
    try:
        parts = await _outside("reward", RewardParts, reward, prompt, trajectory)
        parts = _plain(parts, trajectory)
    except _InfrastructureError as failure:
        return dataclasses.replace(trajectory, stop_reason=StopReason.INFRASTRUCTURE, error=str(failure))
    return dataclasses.replace(trajectory, reward=parts)


class _InfrastructureError(RuntimeError):
    """What the episode stands on failed; the message says where."""


class _Episode:
    """State of a running episode: segments, counters and the messages shown to people."""

    def __init__(
        self,
        engine: Engine,
        renderer: ChatRenderer,
        environment: Environment,
        prompt: Prompt,
        trajectory_id: TrajectoryId,
        noise_key: int,
        limits: EpisodeLimits,
        sampling: SamplingParams,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._environment = environment
        self._prompt = prompt
        self._id = trajectory_id
        self._noise_key = noise_key
        self._limits = limits
        self._sampling = sampling
        self._segments: list[_SegmentBuilder] = []
        self._messages: list[Mapping[str, Any]] = []
        self._versions: list[int] = []
        self._num_turns = 0
        self._num_tool_calls = 0
        self._num_tool_failures = 0
        self._num_tool_turns = 0
        self._environment_reward = 0.0
        self._success = False

    async def play(self) -> StopReason:
        """Alternate turns and steps until the episode ends."""
        observation = await _outside("environment reset", Observation, self._environment.reset, self._prompt)
        self._open_segment(observation)
        while True:
            segment = self._segments[-1]
            budget = self._turn_budget(segment)
            if budget < 1:
                return StopReason.LENGTH
            result = await self._generate(segment, budget)
            segment.append_sampled(result)
            self._num_turns += 1
            text, closed = self._renderer.turn_text(result.output_ids)
            self._messages.append({"role": "assistant", "content": text})
            if result.finish_reason == "length":
                return StopReason.LENGTH
            turn = parse_turn(text, finished=True)
            step = await _outside("environment step", StepResult, self._environment.step, turn)
            self._count(segment, step)
            if step.done:
                return StopReason.VOID_TURN if step.void else StopReason.ANSWER
            if self._num_turns >= self._limits.max_turns:
                return StopReason.TURN_LIMIT
            if step.observation is not None:
                if not self._open_segment(step.observation):
                    return StopReason.LENGTH
            elif not self._insert(segment, step.messages, closed):
                return StopReason.TOOL_OVERFLOW

    def _open_segment(self, observation: Observation) -> bool:
        """Start a segment, unless it is a later one whose prompt is too long."""
        ids = self._renderer.prompt_ids(observation.messages, observation.tools)
        if len(ids) > self._limits.max_prompt_length:
            if self._segments:
                return False
            raise ValueError(
                f"the prompt {self._prompt.task_id!r} has {len(ids)} tokens, more than "
                f"data.max_prompt_length={self._limits.max_prompt_length}: raise it or remove the prompt"
            )
        self._segments.append(_SegmentBuilder(ids, observation.observation_key))
        self._messages.extend(observation.messages)
        return True

    def _turn_budget(self, segment: _SegmentBuilder) -> int:
        return min(
            self._limits.max_response_length - segment.response_length,
            self._limits.max_model_len - len(segment.ids),
            self._sampling.max_new_tokens,
        )

    async def _generate(self, segment: _SegmentBuilder, budget: int) -> GenerateResult:
        index = len(self._segments) - 1
        stops = dict.fromkeys((*self._sampling.stop_token_ids, *self._renderer.stop_token_ids))
        request = GenerateRequest(
            request_id=f"{self._id}/{index}/{self._num_turns}",
            input_ids=tuple(segment.ids),
            sampling=dataclasses.replace(self._sampling, max_new_tokens=budget, stop_token_ids=tuple(stops)),
            # Positions start again in every segment: without a key of its own it would repeat the noise.
            noise_key=self._noise_key if index == 0 else derive_key(self._noise_key, "segment", index),
        )
        try:
            result = await self._engine.generate(request)
        except EngineError as error:
            raise _InfrastructureError(f"engine: {error}") from error
        if result.finish_reason == "abort":
            raise _InfrastructureError(f"engine: request {request.request_id} was aborted")
        if len(result.log_probs) != len(result.output_ids):
            raise _InfrastructureError(
                f"engine: request {request.request_id} has {len(result.output_ids)} tokens "
                f"but {len(result.log_probs)} log-probs"
            )
        if len(result.policy_versions) not in (0, len(result.output_ids)):
            raise _InfrastructureError(
                f"engine: request {request.request_id} has {len(result.output_ids)} tokens "
                f"but {len(result.policy_versions)} policy versions"
            )
        self._versions.extend(result.policy_versions)
        return result

    def _count(self, segment: _SegmentBuilder, step: StepResult) -> None:
        self._num_tool_calls += step.num_tool_calls
        self._num_tool_failures += step.num_tool_failures
        self._num_tool_turns += step.num_tool_calls > 0
        reward = _finite(step.reward)
        self._environment_reward += reward
        self._success = bool(step.done and step.success)
        segment.reward += reward
        segment.num_invalid_actions += int(step.num_invalid_actions)
        if step.error is not None:
            raise _InfrastructureError(step.error)
        if not (step.done or step.messages or step.observation):
            raise _InfrastructureError("environment step: neither done, nor messages, nor an observation")

    def _insert(self, segment: _SegmentBuilder, messages: Sequence[Mapping[str, Any]], closed: bool) -> bool:
        """Append the environment's messages and the next generation prompt, if room for a turn is left after them."""
        shown = [_shortened(message, self._limits.max_tool_response_length) for message in messages]
        ids = self._renderer.delta_ids(shown, closed=closed)
        fits = (
            segment.response_length + len(ids) < self._limits.max_response_length
            and len(segment.ids) + len(ids) < self._limits.max_model_len
        )
        if fits:
            segment.append_inserted(ids)
            self._messages.extend(shown)
        return fits

    def trajectory(self, stop_reason: StopReason, error: str | None) -> Trajectory:
        """The finished episode, with the environment's own reward."""
        return Trajectory(
            id=self._id,
            segments=tuple(segment.build() for segment in self._segments),
            reward=RewardParts(
                outcome=self._environment_reward,
                num_tool_calls=self._num_tool_calls,
                success=self._success,
                num_tool_turns=self._num_tool_turns,
                num_invalid_actions=sum(segment.num_invalid_actions for segment in self._segments),
            ),
            stop_reason=stop_reason,
            policy_version=min(self._versions, default=0),
            num_turns=self._num_turns,
            num_tool_calls=self._num_tool_calls,
            num_tool_failures=self._num_tool_failures,
            messages=tuple(self._messages),
            error=error,
            num_tool_turns=self._num_tool_turns,
        )


class _SegmentBuilder:
    """Ids, mask and log-probs of one segment, always of equal length."""

    def __init__(self, prompt_ids: Sequence[int], observation_key: str | None) -> None:
        self.ids = list(prompt_ids)
        self._mask = [False] * len(self.ids)
        self._log_probs = [0.0] * len(self.ids)
        self._versions = [-1] * len(self.ids)
        self._versions_known = True
        self._prompt_length = len(self.ids)
        self._observation_key = observation_key
        self.reward = 0.0
        self.num_invalid_actions = 0

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, sampled or inserted."""
        return len(self.ids) - self._prompt_length

    def append_sampled(self, result: GenerateResult) -> None:
        known = len(result.policy_versions) == len(result.output_ids)
        self._versions_known &= known
        versions = result.policy_versions if known else [-1] * len(result.output_ids)
        self._append(result.output_ids, True, result.log_probs, versions)

    def append_inserted(self, ids: Sequence[int]) -> None:
        self._append(ids, False, [0.0] * len(ids), [-1] * len(ids))

    def _append(
        self, ids: Sequence[int], sampled: bool, log_probs: Sequence[float], versions: Sequence[int]
    ) -> None:
        self.ids.extend(ids)
        self._mask.extend([sampled] * len(ids))
        self._log_probs.extend(log_probs)
        self._versions.extend(versions)

    def build(self) -> Segment:
        return Segment(
            ids=torch.tensor(self.ids, dtype=torch.int32),
            response_mask=torch.tensor(self._mask, dtype=torch.bool),
            rollout_log_probs=torch.tensor(self._log_probs, dtype=torch.float32),
            observation_key=self._observation_key,
            policy_versions=torch.tensor(self._versions, dtype=torch.int32) if self._versions_known else None,
            reward=self.reward,
            num_invalid_actions=self.num_invalid_actions,
        )


def truncate_middle(text: str, max_chars: int) -> str:
    """``text`` with its middle cut out so that at most ``max_chars`` characters are left."""
    if len(text) <= max_chars:
        return text
    room = max_chars - len(_CUT)
    if room < 2:
        return text[:max_chars]
    tail = room // 2
    return text[: room - tail] + _CUT + text[-tail:]


def _shortened(message: Mapping[str, Any], max_chars: int) -> Mapping[str, Any]:
    content = message.get("content")
    if message.get("role") != "tool" or not isinstance(content, str):
        return message
    return {**message, "content": truncate_middle(content, max_chars)}


async def _outside(what: str, kind: type[T], call: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await code of an environment or a reward; whatever it raises is an infrastructure failure with its place.

    So is a result that is not of the ``kind`` that the protocol asks for.
    """
    try:
        result = await call(*args)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
        raise _InfrastructureError(f"{what}: {type(error).__name__}: {error} ({where})") from error
    if not isinstance(result, kind):
        raise _InfrastructureError(f"{what}: it must return {kind.__name__}, not {type(result).__name__}")
    return result


def _plain(parts: RewardParts, trajectory: Trajectory) -> RewardParts:
    """The parts as Python numbers (a reward may compute them with numpy or torch), which must be finite.

    What the episode counted stands in for counts that the reward left at 0.
    """
    counted = trajectory.reward
    try:
        plain = RewardParts(
            outcome=float(parts.outcome),
            num_tool_calls=int(parts.num_tool_calls) or counted.num_tool_calls,
            penalty=float(parts.penalty),
            success=bool(parts.success),
            num_tool_turns=int(parts.num_tool_turns) or counted.num_tool_turns,
            num_invalid_actions=int(parts.num_invalid_actions) or counted.num_invalid_actions,
        )
    except (TypeError, ValueError) as error:
        raise _InfrastructureError(f"reward: {parts} must hold numbers ({error})") from error
    if not (math.isfinite(plain.outcome) and math.isfinite(plain.penalty)):
        raise _InfrastructureError(f"reward: outcome {plain.outcome} and penalty {plain.penalty} must be finite")
    return plain


def _finite(reward: Any) -> float:
    """An environment's reward of one turn as a Python number."""
    try:
        value = float(reward)
    except (TypeError, ValueError) as error:
        raise _InfrastructureError(f"environment step: reward must be a number, got {reward!r}") from error
    if not math.isfinite(value):
        raise _InfrastructureError(f"environment step: reward must be finite, got {value}")
    return value


async def _close(environment: Environment, trajectory_id: TrajectoryId) -> None:
    try:
        await environment.close()
    except Exception as error:
        # The episode is over and its tokens are sound: a failing clean-up is reported, not scored.
        _LOG.warning("closing the environment of %s failed: %s: %s", trajectory_id, type(error).__name__, error)
