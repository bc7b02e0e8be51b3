"""A small text grid world: take the key, open the door, reach the goal. One word per turn, a reward only at the end.

The map comes with the prompt, so that all samples of a group act in the same world. Every turn opens a new segment
whose prompt is rebuilt from the task, the last few steps and the current observation: the step-wise agent of GiGPO
(arXiv 2505.10978), whose step groups are the turns of a group that start from the same observation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from spear_megatron.environments.grid_map import ACTIONS, GridMap, GridState, advance, observe, parse_map
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.types import Prompt

INVALID = "invalid"
_ACTION = re.compile(r"\s*(?:<action>)?\s*([a-z]+)\s*(?:</action>)?\s*", re.IGNORECASE)


class GridWorldEnvironment:
    """One episode in the map ``prompt.extra["map"]``; the task line is the prompt's own message.

    A turn is one word of up, down, left, right, take, open, alone or within ``<action>`` tags. A readable word counts
    as a tool call, so that ``num_tool_turns`` is the number of turns with a valid action; if it changes nothing (a step
    into a wall) it counts as a tool failure too. Any other text changes nothing and is an invalid action. The reward is
    1 on the turn that reaches the goal and 0 on every other one.
    """

    def __init__(self, *, max_steps: int = 20, history: int = 2) -> None:
        """The episode ends unsolved after ``max_steps`` turns; prompts show the last ``history`` steps."""
        for key, value, least in (("max_steps", max_steps, 1), ("history", history, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"env.kwargs.{key} must be an integer of at least {least}, got {value!r}")
        self._max_steps = max_steps
        self._history = history

    @staticmethod
    def opening(prompt: Prompt) -> Observation:
        """The first prompt of an episode.

        Raises:
            ValueError: the task carries no usable map.
        """
        grid = grid_of(prompt)
        return _observation(prompt, (), observe(grid, grid.start_state))

    async def reset(self, prompt: Prompt) -> Observation:
        """Begin with :meth:`opening`."""
        self._prompt = prompt
        self._grid: GridMap = grid_of(prompt)
        self._state: GridState = self._grid.start_state
        self._steps: list[tuple[str, str]] = []
        return self.opening(prompt)

    async def step(self, turn: Turn) -> StepResult:
        """Carry out the turn's word; the answer is the next observation, or the end of the episode."""
        seen, action = observe(self._grid, self._state), read_action(turn.text)
        before = self._state
        if action is not None:
            self._state = advance(self._grid, before, action)
        self._steps.append((seen, action or INVALID))
        solved = self._state.cell == self._grid.goal
        done = solved or len(self._steps) >= self._max_steps
        following = None
        if not done:
            shown = self._steps[len(self._steps) - min(self._history, len(self._steps)) :]
            following = _observation(self._prompt, shown, observe(self._grid, self._state))
        return StepResult(
            observation=following,
            done=done,
            reward=float(solved),
            num_tool_calls=int(action is not None),
            num_tool_failures=int(self._state == before),
            void=done and action is None,
            success=solved,
            num_invalid_actions=int(action is None),
        )

    def snapshot(self) -> Mapping[str, Any]:
        """Where the agent stands, what it has done, and the steps so far."""
        state = self._state
        return {
            "cell": list(state.cell),
            "has_key": state.has_key,
            "door_open": state.door_open,
            "steps": [list(step) for step in self._steps],
        }

    async def restore(self, prompt: Prompt, state: Mapping[str, Any]) -> None:
        """Stand in the map of ``prompt`` as at the snapshot."""
        self._prompt, self._grid = prompt, grid_of(prompt)
        row, column = state["cell"]
        self._state = GridState((row, column), state["has_key"], state["door_open"])
        self._steps = [(seen, action) for seen, action in state["steps"]]

    async def close(self) -> None:
        """Nothing to free."""


def read_action(text: str) -> str | None:
    """The action that a turn names, or None when the turn is anything but one known word."""
    found = _ACTION.fullmatch(text)
    word = found[1].lower() if found else ""
    return word if word in ACTIONS else None


def grid_of(prompt: Prompt) -> GridMap:
    """The map of a task.

    Raises:
        ValueError: ``map`` is missing or not usable; names the task.
    """
    try:
        return parse_map(prompt.extra.get("map"))
    except ValueError as error:
        raise ValueError(f"the task {prompt.task_id!r} is not one of env.name=grid_world: {error}") from error


def step_text(task: str, steps: Sequence[tuple[str, str]], observation: str) -> str:
    """What the policy reads: the task, one line per shown step (observation: action), the current observation."""
    return "\n".join([task, *(f"{seen}: {action}" for seen, action in steps), observation])


def _observation(prompt: Prompt, steps: Sequence[tuple[str, str]], observation: str) -> Observation:
    *before, last = prompt.messages
    message = {**last, "content": step_text(str(last["content"]), steps, observation)}
    return Observation(messages=(*before, message), observation_key=observation)
