"""What an environment and a reward must offer. Prompts, parsing and tools live behind these two protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from spear_megatron.types import Prompt, RewardParts, Trajectory


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A parsed call. ``error`` is set when the text between the tags was not a usable call: data, not an exception."""

    name: str
    arguments: Mapping[str, Any]
    raw: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished model turn: its verbatim text (without the end-of-turn token) and the tool calls found in it."""

    text: str
    tool_calls: tuple[ToolCall, ...]
    finished: bool  # False when it was cut by a length limit


@dataclass(frozen=True, slots=True)
class Observation:
    """What the policy sees at the start of a segment: a whole conversation and the tools it may call."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    observation_key: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Answer of the environment to one turn.

    ``messages`` are appended to the running segment (tool responses). ``observation`` instead opens a new segment, for
    agents whose prompt is rebuilt at every step. ``done`` ends the episode. ``reward`` is the environment's own reward
    for the turn. ``error`` reports an infrastructure failure: the trajectory is excluded, never scored 0.
    ``void`` goes with ``done`` and says that the turn held neither a tool call nor an answer. ``success`` goes with
    ``done`` too: the environment's own verdict on the episode. ``num_invalid_actions`` is 1 for a turn without a usable
    action.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    observation: Observation | None = None
    done: bool = False
    reward: float = 0.0
    num_tool_calls: int = 0
    num_tool_failures: int = 0
    error: str | None = None
    void: bool = False
    success: bool = False
    num_invalid_actions: int = 0


@runtime_checkable
class Environment(Protocol):
    """One episode. An instance is made per episode and closed after it."""

    async def reset(self, prompt: Prompt) -> Observation:
        """Start the episode of ``prompt`` and return the opening conversation."""
        ...

    async def step(self, turn: Turn) -> StepResult:
        """React to one model turn."""
        ...

    async def close(self) -> None:
        """Free what the episode holds. Called exactly once, also after a failure."""
        ...


@runtime_checkable
class ResumableEnvironment(Protocol):
    """What an environment may offer besides: an episode that goes on later, in another instance.

    Without it, an episode that was stopped starts again from the beginning.
    """

    def snapshot(self) -> Mapping[str, Any]:
        """JSON-able state after the last :meth:`Environment.reset` or :meth:`Environment.step` that was completed."""
        ...

    async def restore(self, prompt: Prompt, state: Mapping[str, Any]) -> None:
        """Stand where ``snapshot`` was taken, in place of ``reset``."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Scores one finished trajectory (its ``reward`` field still holds the environment's own parts)."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        """Return the reward parts. Raising means infrastructure failure: the trajectory is excluded and counted."""
        ...


def final_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Text of the last assistant message, or '' if there is none."""
    for message in reversed(messages):
        if message["role"] == "assistant":
            return str(message.get("content") or "")
    return ""
