"""One sample of an evaluation as a small record: what is judged, counted and shown of a finished episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from spear_megatron.environments.protocol import final_text
from spear_megatron.observability.trajectories import Decode, encode
from spear_megatron.rewards.answers import canonical_answer, official_answer
from spear_megatron.types import Prompt, StopReason, Trajectory, TrajectoryId


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A finished sample.

    Attributes:
        task, sample: position of the problem in the data, and of the sample among those of the problem.
        correct: verdict of the evaluation's reward on ``answer``, the boxed answer of the last turn in canonical form.
        strict_correct: whether ``strict_answer``, read as SPEAR's released code reads it, equals the truth character by
            character; None for problems without an answer to compare with.
        outcome: what the reward gave for the outcome.
        num_prompt_tokens, num_sampled_tokens, num_inserted_tokens: before the first turn, of the model, between turns.
        error: what failed, if infrastructure did: such a sample is neither right nor wrong.
        messages: the conversation.
        trajectory: everything, token ids included, of the few samples that are kept so.
    """

    task: int
    sample: int
    task_id: str
    correct: bool
    answer: str | None
    strict_correct: bool | None
    strict_answer: str | None
    outcome: float
    stop_reason: str
    num_turns: int
    num_tool_calls: int
    num_tool_failures: int
    num_prompt_tokens: int
    num_sampled_tokens: int
    num_inserted_tokens: int
    error: str | None
    messages: tuple[Mapping[str, Any], ...]
    trajectory: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Names the sample within its evaluation."""
        return (self.task, self.sample)

    @property
    def valid(self) -> bool:
        """False when infrastructure failed."""
        return self.stop_reason != StopReason.INFRASTRUCTURE.value

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; ``Sample(**form)`` is the inverse, but for the type of ``messages``."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def sample_from_json(form: Mapping[str, Any]) -> Sample:
    """The inverse of :meth:`Sample.to_json`. Raises TypeError or KeyError for another form."""
    return Sample(**{**form, "messages": tuple(form["messages"])})


def sample_maker(
    decode: Decode, decode_plain: Decode, whole: Collection[tuple[int, int]] = ()
) -> Callable[[Prompt, Trajectory], Sample]:
    """What turns a finished episode into a sample.

    Args:
        decode, decode_plain: text of token ids, with and without control tokens.
        whole: samples that keep their whole trajectory.
    """

    def make(prompt: Prompt, trajectory: Trajectory) -> Sample:
        strict = official_answer(_response(trajectory, decode_plain)) if trajectory.valid else None
        sampled = trajectory.num_response_tokens
        before = sum(segment.prompt_length for segment in trajectory.segments)
        keep = trajectory.id[1:] in whole
        return Sample(
            task=trajectory.id.task,
            sample=trajectory.id.sample,
            task_id=prompt.task_id,
            correct=trajectory.valid and trajectory.reward.success,
            answer=canonical_answer(final_text(trajectory.messages)) if trajectory.valid else None,
            strict_correct=None if prompt.answer is None else strict is not None and strict == prompt.answer,
            strict_answer=strict,
            outcome=trajectory.reward.outcome,
            stop_reason=trajectory.stop_reason.value,
            num_turns=trajectory.num_turns,
            num_tool_calls=trajectory.num_tool_calls,
            num_tool_failures=trajectory.num_tool_failures,
            num_prompt_tokens=before,
            num_sampled_tokens=sampled,
            num_inserted_tokens=trajectory.num_tokens - sampled - before,
            error=trajectory.error,
            messages=tuple(dict(message) for message in trajectory.messages),
            trajectory=encode(trajectory, prompt, trajectory.reward.outcome, decode) if keep else None,
        )

    return make


def all_keys(num_tasks: int, num_samples: int) -> list[tuple[int, int]]:
    """Every (task, sample), in order."""
    return [(task, sample) for task in range(num_tasks) for sample in range(num_samples)]


def key_of(trajectory_id: TrajectoryId) -> tuple[int, int]:
    """The sample that a trajectory is."""
    return (trajectory_id.task, trajectory_id.sample)


def _response(trajectory: Trajectory, decode_plain: Decode) -> str:
    """Text of everything after the prompt, tool output included; of the last segment where there are several."""
    if not trajectory.segments:
        return ""
    segment = trajectory.segments[-1]
    return decode_plain(segment.ids[segment.prompt_length :].tolist())
