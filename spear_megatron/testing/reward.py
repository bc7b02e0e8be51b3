"""The contract of rewards."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from spear_megatron.environments.protocol import Reward
from spear_megatron.testing.contract import require, require_int, served
from spear_megatron.types import Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId

# Last turns that models do end with; none may make a reward raise.
BAD_ENDINGS = (
    "",
    "\\boxed{",
    "\\boxed{}",
    "}{" * 2000,
    "\x00 数 \U0001f600",
    "\\boxed{" + "9" * 10_000 + "}",
    "x" * 200_000,
)


def sample_trajectory(
    prompt: Prompt, final_turn: str | None, *, stop_reason: StopReason = StopReason.ANSWER
) -> Trajectory:
    """An episode of one tool call that ends with the text ``final_turn``; with None, one without any model turn."""
    ids = torch.arange(8, dtype=torch.int32)
    segment = Segment(ids=ids, response_mask=ids > 4, rollout_log_probs=torch.where(ids > 4, -0.5, 0.0))
    turns: tuple[dict[str, Any], ...] = ()
    if final_turn is not None:
        turns = (
            {"role": "assistant", "content": '<tool_call>{"name": "tool", "arguments": {}}</tool_call>'},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": final_turn},
        )
    return Trajectory(
        id=TrajectoryId(1, 0, 0),
        segments=(segment,),
        reward=RewardParts(outcome=0.25, num_tool_calls=1),
        stop_reason=stop_reason,
        policy_version=0,
        num_turns=2 if turns else 0,
        num_tool_calls=1 if turns else 0,
        messages=(*prompt.messages, *turns),
    )


def check_reward(
    reward: Reward,
    prompt: Prompt,
    *,
    good: Sequence[str | Trajectory] = (),
    bad: Sequence[str | Trajectory] = (),
    deadline_s: float = 60.0,
) -> None:
    """Check ``reward`` on episodes of ``prompt``; ``good`` and ``bad`` are trajectories or texts of last turns.

    Checked: types and finite values; that the same trajectory scores the same twice; that every stop reason, empty and
    absurd last turns are scored without raising; that each of ``good`` succeeds, none of ``bad`` does, and every good
    one has a higher outcome than every bad one. Every call has ``deadline_s`` seconds.

    Raises:
        ContractError: naming the broken rule.
    """
    asyncio.run(_check(reward, prompt, good, bad, deadline_s))


async def _check(
    reward: Reward, prompt: Prompt, good: Sequence[str | Trajectory], bad: Sequence[str | Trajectory], deadline_s: float
) -> None:
    require(callable(reward), f"a reward must be callable, {type(reward).__name__} is not")

    async def score(item: str | Trajectory | None, what: str) -> RewardParts:
        trajectory = item if isinstance(item, Trajectory) else sample_trajectory(prompt, item)
        first = await served(f"the reward of {what}", reward(prompt, trajectory), deadline_s)
        _check_parts(first, what)
        second = await served(f"the reward of {what}", reward(prompt, trajectory), deadline_s)
        require(first == second, f"the reward of {what} is not reproducible: {first} and {second}")
        return first

    await score(None, "an episode without model turns")
    for text in BAD_ENDINGS:
        await score(text, f"the last turn {text[:20]!r} ({len(text)} characters)")
    for reason in StopReason:
        if reason is not StopReason.INFRASTRUCTURE:
            trajectory = dataclasses.replace(sample_trajectory(prompt, "hm"), stop_reason=reason)
            await score(trajectory, f"an episode stopped by {reason.value}")
    goods = [await score(item, f"good example {index}") for index, item in enumerate(good)]
    bads = [await score(item, f"bad example {index}") for index, item in enumerate(bad)]
    for index, parts in enumerate(goods):
        require(parts.success, f"good example {index} has success=False")
    for index, parts in enumerate(bads):
        require(not parts.success, f"bad example {index} has success=True")
    if goods and bads:
        worst, best = min(parts.outcome for parts in goods), max(parts.outcome for parts in bads)
        require(worst > best, f"a good example has outcome {worst}, not above {best} of a bad one")


def _check_parts(parts: object, what: str) -> None:
    require(isinstance(parts, RewardParts), f"the reward of {what} must be RewardParts, got {type(parts).__name__}")
    assert isinstance(parts, RewardParts)
    for key in ("outcome", "penalty"):
        value = getattr(parts, key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number and math.isfinite(value), f"the {key} of {what} must be a finite number, got {value!r}")
    for key in ("num_tool_calls", "num_tool_turns", "num_invalid_actions"):
        require_int(getattr(parts, key), f"the {key} of {what}")
    require(isinstance(parts.success, bool), f"the success of {what} must be a bool, got {parts.success!r}")
