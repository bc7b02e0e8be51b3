"""Environments that misbehave on demand, for tests of workers."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.types import Prompt


class Obedient:
    """Counts its turns and does what a turn says: die, block, sleep, raise, odd, pid; anything else is echoed."""

    def __init__(self, *, journal: str | None = None, fail: bool = False) -> None:
        if fail:
            raise RuntimeError("cannot be made")
        self._journal = journal
        self._turns = 0

    async def reset(self, prompt: Prompt) -> Observation:
        """The prompt's messages; a prompt called once-FILE kills the worker of its first episode."""
        if prompt.task_id.startswith("once-") and not Path(prompt.task_id[5:]).exists():
            Path(prompt.task_id[5:]).touch()
            os._exit(4)
        self._note(f"reset {prompt.task_id}")
        return Observation(messages=prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        """Do as told."""
        self._turns += 1
        word, _, rest = turn.text.partition(" ")
        content = f"{self._turns} {turn.text}"
        if word == "die":
            os._exit(3)
        if word == "block":
            time.sleep(float(rest))
        if word == "sleep":
            self._note("sleeping")
            await asyncio.sleep(float(rest))
        if word == "raise":
            raise KeyError("told to")
        if word == "odd":
            return StepResult(messages=({"role": "tool", "content": lambda: 0},))
        if word == "pid":
            content = str(os.getpid())
        return StepResult(messages=({"role": "tool", "content": content},), done=word == "end")

    async def close(self) -> None:
        """Tell the journal."""
        self._note(f"close after {self._turns}")

    def _note(self, text: str) -> None:
        if self._journal is not None:
            with open(self._journal, "a") as file:
                file.write(text + "\n")
