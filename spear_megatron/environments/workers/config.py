"""Where environments run (config section ``env.workers``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BACKENDS = ("local", "process", "ray")


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Workers of one data-parallel leader.

    An episode whose worker is lost counts as an infrastructure failure: it is tried once more, on another worker, and
    never scored 0. Workers share ``env.sandbox.workers`` among their sandboxes.
    """

    backend: Literal["local", "process", "ray"] = "local"
    """local: in the event loop of the episodes; process: child processes; ray: Ray actors, anywhere in the cluster."""
    number: int = 4
    """Workers; every one runs many episodes at a time."""
    timeout_s: float = 600.0
    """Longest time of one reset or step of an environment in a worker."""
    start_timeout_s: float = 120.0
    """Longest time until a worker has imported the environment."""
    max_restarts: int = 20
    """Workers that may be replaced in all before episodes fail."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"env.workers.backend is {self.backend!r}; use one of {', '.join(BACKENDS)}")
        for name, lowest in (("number", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"env.workers.{name} is {value!r}; use a whole number of at least {lowest}")
        for name in ("timeout_s", "start_timeout_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"env.workers.{name} is {getattr(self, name)!r}; use seconds between 0 and 1e6")
