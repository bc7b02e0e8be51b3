"""Which environment the agent acts in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spear_megatron.environments.sandbox.config import SandboxConfig
from spear_megatron.environments.workers.config import WorkersConfig


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """Keys under ``env``.

    ``name`` is a built-in environment or ``module:attribute`` of a class or function that makes one per episode from
    ``kwargs``. ``sandbox`` is started only for environments that run code.
    """

    name: str = "code_interpreter"
    """Built-in environment (code_interpreter, grid_world), or module:attribute of what makes one per episode."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("env.name is empty: use code_interpreter, grid_world or 'module:attribute'")
