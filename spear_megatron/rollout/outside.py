"""Calling what others wrote, environments and rewards: whatever they raise or return is told apart from the policy."""

from __future__ import annotations

import math
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from spear_megatron.types import RewardParts, Trajectory

T = TypeVar("T")


class InfrastructureError(RuntimeError):
    """What the episode stands on failed; the message says where."""


async def outside(what: str, kind: type[T], call: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await code of an environment or a reward; whatever it raises is an infrastructure failure with its place.

    So is a result that is not of the ``kind`` that the protocol asks for.
    """
    try:
        result = await call(*args)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
        raise InfrastructureError(f"{what}: {type(error).__name__}: {error} ({where})") from error
    if not isinstance(result, kind):
        raise InfrastructureError(f"{what}: it must return {kind.__name__}, not {type(result).__name__}")
    return result


def plain_parts(parts: RewardParts, trajectory: Trajectory) -> RewardParts:
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
        raise InfrastructureError(f"reward: {parts} must hold numbers ({error})") from error
    if not (math.isfinite(plain.outcome) and math.isfinite(plain.penalty)):
        raise InfrastructureError(f"reward: outcome {plain.outcome} and penalty {plain.penalty} must be finite")
    return plain


def finite_reward(reward: Any) -> float:
    """An environment's reward of one turn as a Python number."""
    try:
        value = float(reward)
    except (TypeError, ValueError) as error:
        raise InfrastructureError(f"environment step: reward must be a number, got {reward!r}") from error
    if not math.isfinite(value):
        raise InfrastructureError(f"environment step: reward must be finite, got {value}")
    return value
