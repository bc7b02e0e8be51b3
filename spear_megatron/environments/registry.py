"""Environments by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.environments.protocol import Environment, Observation
from spear_megatron.environments.sandbox.protocol import Sandbox
from spear_megatron.rewards.registry import check_arguments, resolve_target
from spear_megatron.types import Prompt

ENVIRONMENTS: Mapping[str, str] = {
    "code_interpreter": "spear_megatron.environments.code_interpreter:CodeInterpreterEnvironment",
    "grid_world": "spear_megatron.environments.grid_world:GridWorldEnvironment",
}

EnvironmentFactory = Callable[[], Environment]


def needs_sandbox(config: EnvironmentConfig) -> bool:
    """Whether the environment runs code: its class or function has a true attribute ``needs_sandbox``."""
    return bool(getattr(resolve_target(config.name, ENVIRONMENTS, key="env"), "needs_sandbox", False))


def opening_of(config: EnvironmentConfig) -> Callable[[Prompt], Observation] | None:
    """What the environment opens an episode with, if that is known without one: its static method ``opening``."""
    return getattr(resolve_target(config.name, ENVIRONMENTS, key="env"), "opening", None)


def check_environment_settings(config: EnvironmentConfig) -> None:
    """ValueError unless ``env.name`` can be resolved and ``env.kwargs`` fit it; starts nothing."""
    target = resolve_target(config.name, ENVIRONMENTS, key="env")
    shared = {"sandbox": None} if needs_sandbox(config) else {}
    check_arguments(target, {**config.kwargs, **shared}, key="env")


def environment_factory(config: EnvironmentConfig, sandbox: Sandbox | None = None) -> EnvironmentFactory:
    """A function that makes the environment of one episode.

    An environment that needs a sandbox gets it as the keyword ``sandbox``; it is shared and never closed by episodes.

    Raises:
        ValueError: the name cannot be resolved, the arguments do not fit, or a needed sandbox is missing.
    """
    target = resolve_target(config.name, ENVIRONMENTS, key="env")
    kwargs: dict[str, Any] = dict(config.kwargs)
    if needs_sandbox(config):
        if sandbox is None:
            raise ValueError(f"env.name {config.name!r} runs code and needs a sandbox: start one from env.sandbox")
        kwargs["sandbox"] = sandbox
    check_arguments(target, kwargs, key="env")
    return functools.partial(target, **kwargs)
