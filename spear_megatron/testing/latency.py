"""An environment that takes its time, for tests and benchmarks of what happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.types import Prompt


class LatencyEnvironment:
    """Answers each of the first ``num_turns`` - 1 turns with a short message; every step takes ``latency_s`` seconds.

    With ``spread`` the latency of an episode is multiplied by a number between 1 and 1 + ``spread`` that depends on the
    task alone, so that some groups are slow.
    """

    def __init__(self, *, latency_s: float = 0.1, num_turns: int = 2, spread: float = 0.0) -> None:
        if latency_s < 0 or spread < 0 or num_turns < 1:
            raise ValueError(
                "env.kwargs needs latency_s and spread of at least 0 and num_turns of at least 1, "
                f"got {latency_s}, {spread} and {num_turns}"
            )
        self._latency_s, self._num_turns, self._spread = latency_s, num_turns, spread

    @staticmethod
    def opening(prompt: Prompt) -> Observation:
        """The prompt's own messages."""
        return Observation(messages=prompt.messages)

    async def reset(self, prompt: Prompt) -> Observation:
        """Begin with :meth:`opening`."""
        await self.restore(prompt, {"turns": 0})
        return self.opening(prompt)

    def snapshot(self) -> Mapping[str, Any]:
        """Turns so far."""
        return {"turns": self._turns}

    async def restore(self, prompt: Prompt, state: Mapping[str, Any]) -> None:
        """Go on after so many turns."""
        slowness = sum(prompt.task_id.encode()) % 11 / 10
        self._seconds = self._latency_s * (1.0 + self._spread * slowness)
        self._turns = int(state["turns"])

    async def step(self, turn: Turn) -> StepResult:
        """Sleep, then go on or end."""
        await asyncio.sleep(self._seconds)
        self._turns += 1
        if self._turns >= self._num_turns:
            return StepResult(done=True, success=True)
        return StepResult(messages=({"role": "user", "content": "go on"},))

    async def close(self) -> None:
        """Nothing to free."""
