"""Rewards by name, and how a ``module:attribute`` in the configuration becomes a callable."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spear_megatron.environments.protocol import Reward

REWARDS: Mapping[str, str] = {
    "math": "spear_megatron.rewards.math:MathReward",
    "environment": "spear_megatron.rewards.environment:EnvironmentReward",
}


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Keys under ``reward``.

    ``name`` is a built-in reward or ``module:attribute`` of a class or function that makes one from ``kwargs``.
    """

    name: str = "math"
    """Built-in reward (math, environment), or module:attribute of a class or function that makes one."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(f"reward.name is empty: use one of {', '.join(REWARDS)} or 'module:attribute'")


def check_reward_settings(config: RewardConfig) -> None:
    """ValueError unless ``reward.name`` can be resolved and ``reward.kwargs`` fit it; makes nothing."""
    check_arguments(resolve_target(config.name, REWARDS, key="reward"), config.kwargs, key="reward")


def build_reward(config: RewardConfig) -> Reward:
    """The reward that the configuration names.

    Raises:
        ValueError: the name cannot be resolved, the arguments do not fit, or the result is not a reward.
    """
    target = resolve_target(config.name, REWARDS, key="reward")
    check_arguments(target, config.kwargs, key="reward")
    reward = target(**config.kwargs)
    if not callable(reward):
        raise ValueError(f"reward.name {config.name!r} makes a {type(reward).__name__}, which cannot be called")
    return reward


def resolve_target(name: str, builtin: Mapping[str, str], *, key: str) -> Callable[..., Any]:
    """The callable behind ``name``: a key of ``builtin`` or ``module:attribute``.

    Raises:
        ValueError: naming ``key.name``, what is wrong, and the remedy.
    """
    path = builtin.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        near = difflib.get_close_matches(name, builtin, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(builtin)} or 'module:attribute'"
        raise ValueError(f"{key}.name {name!r} is not known: {hint}")
    if "/" in module_name or module_name.endswith(".py"):
        stem = module_name.rpartition("/")[2].removesuffix(".py")
        raise ValueError(
            f"{key}.name {name!r} is the path of a file: write '{stem}:{attribute}' and put the file's folder on "
            "PYTHONPATH"
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError) as error:  # TypeError: a relative name
        raise ValueError(
            f"{key}.name {name!r}: cannot import {module_name!r} ({error}); install it, or put its folder on PYTHONPATH"
        ) from error
    target = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{key}.name {name!r}: {module_name} has no attribute {attribute!r}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"{key}.name {name!r} is a {type(target).__name__}; it must be a class or a function")
    return target


def check_arguments(target: Callable[..., Any], kwargs: Mapping[str, Any], *, key: str) -> None:
    """ValueError naming ``key.kwargs`` unless ``target(**kwargs)`` fits its signature."""
    try:
        inspect.signature(target).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"{key}.kwargs do not fit {getattr(target, '__qualname__', target)}: {error}") from error
