"""Settings of servers that the trainer starts itself (config section ``actor_rollout_ref.rollout.sglang.launch``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_KEY = "actor_rollout_ref.rollout.sglang.launch"
OWN_ARGUMENTS = frozenset(
    {
        "model-path", "model", "host", "port", "device", "tp-size", "tensor-parallel-size", "tp", "dtype",
        "context-length", "max-running-requests", "enable-memory-saver", "weight-version", "base-gpu-id", "config",
    }
)  # fmt: skip
"""Arguments of `sglang.launch_server` that follow from other keys of the configuration."""


@dataclass(frozen=True, kw_only=True)
class SGLangLaunchConfig:
    """How servers are started, watched and replaced.

    They are started where ``rollout.sglang.servers`` names none. A server that dies or hangs is replaced, with growing
    pauses; ``max_restarts`` in a row without ``stable_s`` seconds of service in between give it up.
    """

    num_servers: int = 1
    """Servers of one machine of the job; with backend=ray, servers in all."""
    python: str | None = None
    """Interpreter of the environment that holds sglang; null takes the trainer's own."""
    backend: Literal["process", "ray"] = "process"
    """process: children of the trainer; ray: one actor per server, anywhere in the cluster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where servers compute; auto takes cuda where the trainer does."""
    tp_size: int = 1
    """GPUs of one server (its tensor parallel size)."""
    host: str = "127.0.0.1"
    """Address that servers listen on; several nodes need one that the others reach."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of sglang.launch_server, without dashes: {mem-fraction-static: 0.6}; true is a bare flag."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of servers."""
    ready_timeout_s: float = 300.0
    """Longest time from the start of a server until it answers."""
    stop_timeout_s: float = 10.0
    """Time that a server has to end by itself before it is killed with all its processes."""
    health_interval_s: float = 2.0
    """Pause between two health checks of a server."""
    hung_after_s: float = 60.0
    """A server that answers no health check for so long is killed and replaced."""
    max_restarts: int = 3
    """Replacements in a row before a server is given up."""
    restart_backoff_s: float = 1.0
    """Pause before the first replacement; doubles with every further one, up to a minute."""
    stable_s: float = 600.0
    """Service after which earlier replacements no longer count."""
    log_folder: str | None = None
    """Folder of the servers' logs; null takes sglang/ in the run directory."""

    def __post_init__(self) -> None:
        for name, lowest in (("num_servers", 1), ("tp_size", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{_KEY}.{name} must be a whole number of at least {lowest}, got {value!r}")
        for name in (
            "ready_timeout_s", "stop_timeout_s", "health_interval_s", "hung_after_s", "restart_backoff_s", "stable_s",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{_KEY}.{name} must be seconds between 0 and 1e6, got {getattr(self, name)!r}")
        for name, known in (("backend", ("process", "ray")), ("device", ("auto", "cpu", "cuda"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{_KEY}.{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.device == "cpu" and self.tp_size > 1:
            raise ValueError(f"{_KEY}.tp_size={self.tp_size} needs GPUs: set it to 1 with device=cpu")
        if self.hung_after_s <= self.health_interval_s:
            raise ValueError(f"{_KEY}.hung_after_s must exceed health_interval_s ({self.health_interval_s:g})")
        _check_arguments(self.args)
        wrong = [name for name, value in self.env.items() if not isinstance(name, str) or not isinstance(value, str)]
        if wrong:
            raise ValueError(f"{_KEY}.env: {wrong[0]!r} must be a text with a text as value (quote numbers)")


def _check_arguments(args: Mapping[str, Any]) -> None:
    for name, value in args.items():
        plain = str(name).replace("_", "-")
        if not isinstance(name, str) or not name or name.startswith("-"):
            raise ValueError(f"{_KEY}.args: write {name!r} without leading dashes")
        if plain in OWN_ARGUMENTS:
            raise ValueError(f"{_KEY}.args.{name} is set from other keys of the configuration: remove it")
        items = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, (bool, int, float, str)) for item in items):
            raise ValueError(f"{_KEY}.args.{name} must be a number, a text, true, or a list of them, got {value!r}")
