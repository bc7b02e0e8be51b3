"""The reward of environments that score themselves."""

from __future__ import annotations

import math

from spear_megatron.types import Prompt, RewardParts, Trajectory


class EnvironmentReward:
    """Passes on what the environment gave: the sum of its rewards, times ``scale``, and its own verdict.

    ``scale`` acts on the trajectory's outcome alone; step returns (``algorithm.adv_estimator=gigpo``) are made from the
    environment's rewards as they are.
    """

    def __init__(self, *, scale: float = 1.0) -> None:
        """``scale`` must be a positive number."""
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number or not 0 < scale < math.inf:
            raise ValueError(f"reward.kwargs.scale must be a positive number, got {scale!r}")
        self._scale = float(scale)

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        """The environment's own parts."""
        own = trajectory.reward
        return RewardParts(
            outcome=self._scale * own.outcome,
            num_tool_calls=own.num_tool_calls,
            penalty=own.penalty,
            success=own.success,
            num_tool_turns=own.num_tool_turns,
            num_invalid_actions=own.num_invalid_actions,
        )
