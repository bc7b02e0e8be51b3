"""A guessing game: find a hidden number; after each guess the world says whether it is higher or lower.

The prompt is rebuilt at every step from what is known, so every step is a segment of its own.
"""

from __future__ import annotations

import re
from dataclasses import replace

from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.types import Prompt, RewardParts, Trajectory

_GUESS = re.compile(r"<guess>\s*(\d{1,6})\s*</guess>")


class GuessEnvironment:
    """One game. The hidden number is the prompt's answer."""

    def __init__(self, *, high: int = 100, max_guesses: int = 8) -> None:
        self._range = (1, high)
        self._max_guesses = max_guesses

    async def reset(self, prompt: Prompt) -> Observation:
        self._secret = int(prompt.answer or 0)
        self._low, self._high = self._range
        self._num_guesses = 0
        return self._observation()

    async def step(self, turn: Turn) -> StepResult:
        self._num_guesses += 1
        found = _GUESS.search(turn.text)
        if found is None:  # counts as a guess: the model must learn to answer in the form asked for
            return self._next(failed=True)
        guess = int(found[1])
        if guess == self._secret:
            return StepResult(done=True, reward=1.0, num_tool_calls=1, success=True)
        if guess < self._secret:
            self._low = max(self._low, guess + 1)
        else:
            self._high = min(self._high, guess - 1)
        return self._next(failed=False)

    async def close(self) -> None:
        """Nothing to free."""

    def _next(self, *, failed: bool) -> StepResult:
        bad = int(failed)
        result = StepResult(num_tool_calls=1 - bad, num_tool_failures=bad, num_invalid_actions=bad)
        if self._num_guesses == self._max_guesses:
            return replace(result, done=True, void=failed)
        return replace(result, observation=self._observation())

    def _observation(self) -> Observation:
        left = self._max_guesses - self._num_guesses
        text = (
            f"Find the hidden number. It lies between {self._low} and {self._high}. Guesses left: {left}. "
            "Answer with <guess>number</guess>."
        )
        return Observation(
            messages=({"role": "user", "content": text},), observation_key=f"{self._low}-{self._high}"
        )


class GuessReward:
    """1 for a found number, less ``cost`` for every guess after the first; 0 otherwise."""

    def __init__(self, *, cost: float = 0.05) -> None:
        self._cost = cost

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        found = trajectory.reward.success  # the environment's own verdict
        return RewardParts(
            outcome=1.0 if found else 0.0,
            penalty=-self._cost * max(0, trajectory.num_turns - 1) if found else 0.0,
            success=found,
        )
