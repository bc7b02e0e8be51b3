"""The inside of a worker: many episodes' environments, called by episode number."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from typing import Any, Literal

from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.environments.protocol import Environment
from spear_megatron.environments.registry import environment_factory, needs_sandbox
from spear_megatron.environments.sandbox.factory import open_sandbox

Method = Literal["reset", "step", "close", "ping"]
Answer = tuple[bool, Any]
"""(True, result) or (False, text of the error with its place)."""


class EpisodeHost:
    """Makes an environment at an episode's reset, calls it, and forgets it at its close.

    Raises:
        ValueError: the environment cannot be made here, or no sandbox works here.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        self._sandbox = open_sandbox(config.sandbox) if needs_sandbox(config) else None
        self._make = environment_factory(config, self._sandbox)
        self._episodes: dict[int, Environment] = {}
        self._running: dict[int, asyncio.Task[Any]] = {}

    async def call(self, episode: int, method: Method, argument: Any) -> Answer:
        """Run one method of the episode's environment; what it raises becomes the answer."""
        if method == "ping":
            return True, None
        if method == "close":
            return await self._close(episode)
        if method == "reset":
            self._episodes[episode] = self._make()
        task = asyncio.ensure_future(getattr(self._episodes[episode], method)(argument))
        self._running[episode] = task
        try:
            return True, await task
        except asyncio.CancelledError:
            return False, "the episode was closed"
        except Exception as error:  # of a user's code: the episode is told
            return False, described(error)
        finally:
            self._running.pop(episode, None)

    async def _close(self, episode: int) -> Answer:
        running = self._running.get(episode)
        if running is not None:
            running.cancel()
            await asyncio.wait([running])
        environment = self._episodes.pop(episode, None)
        if environment is not None:
            try:
                await environment.close()
            except Exception as error:  # of a user's code: the episode is told
                return False, described(error)
        return True, None

    async def close(self) -> None:
        """Close every environment that is left, and the sandbox."""
        for episode in list(self._episodes):
            await self._close(episode)
        if self._sandbox is not None:
            with contextlib.suppress(OSError):
                await self._sandbox.close()


def described(error: Exception) -> str:
    """An error as one line with its place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"
