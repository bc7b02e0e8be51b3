"""One episode: the policy and an environment talk, token in token out, until an explicit stop reason.

What the policy sampled stays as it is; what is inserted between turns is the chat template's own text. Ids, response
mask and log-probs grow together. An environment that rebuilds the prompt opens a new segment of the same trajectory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spear_megatron.data.chat import ChatRenderer
from spear_megatron.data.tool_calls import parse_turn
from spear_megatron.environments.protocol import Environment, Observation, ResumableEnvironment, Reward, StepResult
from spear_megatron.parallel.seeds import derive_key
from spear_megatron.rollout.engine import (
    Engine,
    EngineError,
    GenerateRequest,
    GenerateResult,
    RequestStopped,
    SamplingParams,
)
from spear_megatron.rollout.outside import InfrastructureError, finite_reward, outside, plain_parts
from spear_megatron.rollout.partial import EpisodeSlot, PartialEpisode, Stage
from spear_megatron.rollout.segments import SegmentBuilder
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory, TrajectoryId

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
    slot: EpisodeSlot | None = None,
) -> Trajectory:
    """Play one episode, close its ``environment``, and score it.

    A failing engine, environment or reward gives a trajectory with ``StopReason.INFRASTRUCTURE`` and ``error`` set; it
    keeps what was sampled, for viewing. Equal arguments and weights give the same tokens: sampling noise depends on
    ``noise_key``, the segment and the token position. ``sampling.max_new_tokens`` bounds one turn; a turn that it or
    another limit cuts ends the episode.

    ``slot`` may say where an earlier run of this episode was stopped, and tells others how far this one is, also after
    it was cancelled. Only with a resumable one is the environment asked for its state after every step.

    Raises:
        RequestStopped: a stoppable engine was told to end all requests.
        ValueError: the prompt is longer than ``max_prompt_length``, or the engine can never serve the request.
    """
    episode = _Episode(engine, renderer, environment, prompt, trajectory_id, noise_key, limits, sampling)
    error: str | None = None
    if slot is not None:
        episode.resumable = slot.resumable
        slot.bind(episode)
    try:
        if slot is not None and slot.resume is not None:
            await episode.resume(slot.resume)
        stop_reason = await episode.play()
    except InfrastructureError as failure:
        stop_reason, error = StopReason.INFRASTRUCTURE, str(failure)
    finally:
        await _close(environment, trajectory_id)
    trajectory = episode.trajectory(stop_reason, error)
    if not trajectory.valid:
        return trajectory
    try:
        parts = await outside("reward", RewardParts, reward, prompt, trajectory)
        parts = plain_parts(parts, trajectory)
    except InfrastructureError as failure:
        return dataclasses.replace(trajectory, stop_reason=StopReason.INFRASTRUCTURE, error=str(failure))
    return dataclasses.replace(trajectory, reward=parts)


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
        self._segments: list[SegmentBuilder] = []
        self._messages: list[Mapping[str, Any]] = []
        self._versions: list[int] = []
        self._num_turns = 0
        self._num_tool_calls = 0
        self._num_tool_failures = 0
        self._num_tool_turns = 0
        self._environment_reward = 0.0
        self._success = False
        self._stage: Stage = "turn"
        self._turn_start = 0
        self._ended: StopReason | None = None
        self._kept: Mapping[str, Any] | None = None
        self.resumable = False

    async def resume(self, partial: PartialEpisode) -> None:
        """Take up an episode where it was stopped."""
        before = partial.trajectory
        self._segments = [SegmentBuilder.of(segment) for segment in before.segments]
        self._messages = list(before.messages)
        for segment in before.segments:
            if segment.policy_versions is not None:
                self._versions += segment.policy_versions[segment.response_mask].tolist()
        self._num_turns = before.num_turns
        self._num_tool_calls, self._num_tool_failures = before.num_tool_calls, before.num_tool_failures
        self._num_tool_turns = before.num_tool_turns
        self._environment_reward, self._success = before.reward.outcome, before.reward.success
        self._stage, self._turn_start, self._kept = partial.stage, partial.turn_start, partial.environment
        if partial.stage == "reward":
            self._ended = before.stop_reason
            return
        assert isinstance(self._environment, ResumableEnvironment)
        await outside("environment restore", object, self._environment.restore, self._prompt, partial.environment)

    async def play(self) -> StopReason:
        """Alternate turns and steps until the episode ends."""
        if not self._segments:
            observation = await outside("environment reset", Observation, self._environment.reset, self._prompt)
            self._open_segment(observation)
            self._keep_environment()
        while self._ended is None:
            if self._stage == "turn":
                self._ended = await self._play_turn(self._segments[-1])
            else:
                self._ended = await self._play_step(self._segments[-1])
        self._stage = "reward"
        return self._ended

    async def _play_turn(self, segment: SegmentBuilder) -> StopReason | None:
        """Sample one model turn, or what is left of it."""
        budget = self._turn_budget(segment)
        if budget < 1:
            return StopReason.LENGTH
        result = await self._generate(segment, budget)
        segment.append_sampled(result)
        self._num_turns += 1
        self._stage = "step"
        text, _ = self._renderer.turn_text(segment.ids[self._turn_start :])
        self._messages.append({"role": "assistant", "content": text})
        return StopReason.LENGTH if result.finish_reason == "length" else None

    async def _play_step(self, segment: SegmentBuilder) -> StopReason | None:
        """Let the environment react to the turn."""
        text, closed = self._renderer.turn_text(segment.ids[self._turn_start :])
        turn = parse_turn(text, finished=True)
        step = await outside("environment step", StepResult, self._environment.step, turn)
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
        self._stage = "turn"
        self._keep_environment()
        return None

    def _keep_environment(self) -> None:
        """Remember where the environment stands, and that a turn begins."""
        self._turn_start = len(self._segments[-1].ids)
        if not self.resumable or not isinstance(self._environment, ResumableEnvironment):
            return
        try:  # as a checkpoint will give it back: what is no JSON shows here, on this episode alone
            self._kept = json.loads(json.dumps(dict(self._environment.snapshot())))
        except Exception as error:
            raise InfrastructureError(f"environment snapshot: {type(error).__name__}: {error}") from error

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far, over all segments."""
        return sum(segment.num_sampled for segment in self._segments)

    def partial(self) -> PartialEpisode | None:
        """The episode as it stands; None if it cannot go on later or has sampled nothing."""
        if self._kept is None or not self.num_sampled:
            return None
        trajectory = self.trajectory(self._ended or StopReason.LENGTH, None)
        return PartialEpisode(trajectory, self._kept, self._stage, self._turn_start)

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
        self._segments.append(SegmentBuilder(ids, observation.observation_key))
        self._messages.extend(observation.messages)
        return True

    def _turn_budget(self, segment: SegmentBuilder) -> int:
        return min(
            self._limits.max_response_length - segment.response_length,
            self._limits.max_model_len - len(segment.ids),
            self._sampling.max_new_tokens - (len(segment.ids) - self._turn_start),
        )

    async def _generate(self, segment: SegmentBuilder, budget: int) -> GenerateResult:
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
        except RequestStopped as stop:
            self._check(request, stop.result)
            segment.append_sampled(stop.result)
            raise
        except EngineError as error:
            raise InfrastructureError(f"engine: {error}") from error
        if result.finish_reason == "abort":
            raise InfrastructureError(f"engine: request {request.request_id} was aborted")
        self._check(request, result)
        return result

    def _check(self, request: GenerateRequest, result: GenerateResult) -> None:
        """Infrastructure fails where a token lacks its log-prob or version."""
        if len(result.log_probs) != len(result.output_ids):
            raise InfrastructureError(
                f"engine: request {request.request_id} has {len(result.output_ids)} tokens "
                f"but {len(result.log_probs)} log-probs"
            )
        if len(result.policy_versions) not in (0, len(result.output_ids)):
            raise InfrastructureError(
                f"engine: request {request.request_id} has {len(result.output_ids)} tokens "
                f"but {len(result.policy_versions)} policy versions"
            )
        self._versions.extend(result.policy_versions)

    def _count(self, segment: SegmentBuilder, step: StepResult) -> None:
        """Add a sound step to the counts; one that failed adds nothing, so that a repeat of it counts once."""
        reward = finite_reward(step.reward)
        if step.error is not None:
            raise InfrastructureError(step.error)
        if not (step.done or step.messages or step.observation):
            raise InfrastructureError("environment step: neither done, nor messages, nor an observation")
        self._num_tool_calls += step.num_tool_calls
        self._num_tool_failures += step.num_tool_failures
        self._num_tool_turns += step.num_tool_calls > 0
        self._environment_reward += reward
        self._success = bool(step.done and step.success)
        segment.reward += reward
        segment.num_invalid_actions += int(step.num_invalid_actions)

    def _insert(self, segment: SegmentBuilder, messages: Sequence[Mapping[str, Any]], closed: bool) -> bool:
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


async def _close(environment: Environment, trajectory_id: TrajectoryId) -> None:
    try:
        await environment.close()
    except Exception as error:
        # The episode is over and its tokens are sound: a failing clean-up is reported, not scored.
        _LOG.warning("closing the environment of %s failed: %s: %s", trajectory_id, type(error).__name__, error)
