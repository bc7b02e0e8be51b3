"""Settings of generation with SGLang servers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.weights_config import WeightsConfig

_PREFIX = "actor_rollout_ref.rollout.sglang"
_POSITIVE = ("request_timeout_s", "min_tokens_per_s", "health_interval_s", "health_timeout_s", "control_timeout_s")


@dataclass(frozen=True, kw_only=True)
class SGLangConfig:
    """How the data-parallel leaders generate with SGLang servers, which all of them share.

    Attributes:
        servers: URLs of running servers, such as http://10.0.0.7:30000; none: the run starts its own, by ``launch``.
        router: URL of a router that spreads requests over servers; null lets the engine choose among them itself.
            Weights and aborts still go to the servers one by one.
        max_in_flight: requests that all leaders together keep at one server; null takes rollout.max_num_seqs.
        request_timeout_s: seconds that a request may take besides its tokens: waiting at the server, prompt, pauses.
        min_tokens_per_s: slowest acceptable rate of one request; max_new_tokens over it is added to its deadline.
        retries: attempts after the first of a request whose server failed; each has an id of its own.
        health_interval_s: seconds between the health checks of a server.
        health_timeout_s: seconds that a health check may take.
        health_failures: checks in a row that fail before a server gets no more requests.
        control_timeout_s: seconds that a pause, an abort or a piece of the weights may take.
        colocated: whether started servers share the trainer's GPUs and take turns with it.
        max_bucket_mb: weights sent together in one request, in MiB.
    """

    servers: tuple[str, ...] = ()
    router: str | None = None
    max_in_flight: int | None = None
    request_timeout_s: float = 300.0
    min_tokens_per_s: float = 2.0
    retries: int = 2
    health_interval_s: float = 5.0
    health_timeout_s: float = 30.0
    health_failures: int = 3
    control_timeout_s: float = 120.0
    max_bucket_mb: int = 256
    colocated: bool = False
    launch: SGLangLaunchConfig = field(default_factory=SGLangLaunchConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)

    def __post_init__(self) -> None:
        for name in ("servers", "router"):
            value = getattr(self, name)
            for url in value if isinstance(value, tuple) else (value,) if value is not None else ():
                _require_url(f"{_PREFIX}.{name}", url)
        repeated = sorted({url for url in self.servers if self.servers.count(url) > 1})
        if repeated:
            raise ValueError(f"{_PREFIX}.servers names {repeated[0]} more than once: give every server once")
        for name in _POSITIVE:
            _require_positive_number(f"{_PREFIX}.{name}", getattr(self, name))
        if self.max_in_flight is not None:
            _require_count(f"{_PREFIX}.max_in_flight", self.max_in_flight, at_least=1)
        if self.colocated and self.servers:
            raise ValueError(
                f"{_PREFIX}.colocated=true needs servers that the run starts itself: remove {_PREFIX}.servers"
            )
        _require_count(f"{_PREFIX}.retries", self.retries, at_least=0)
        _require_count(f"{_PREFIX}.health_failures", self.health_failures, at_least=1)
        _require_count(f"{_PREFIX}.max_bucket_mb", self.max_bucket_mb, at_least=1)

    def deadline_s(self, max_new_tokens: int) -> float:
        """Seconds that a request for so many tokens may take once it was sent."""
        return self.request_timeout_s + max_new_tokens / self.min_tokens_per_s


def _require_url(key: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"{key}: {url!r} is no URL of a server: give scheme, host and port, as http://10.0.0.7:30000")


def _require_positive_number(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{key} must be a positive number, got {value!r}")


def _require_count(key: str, value: int, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{key} must be an integer of at least {at_least}, got {value!r}")
