"""What an SGLang engine did, as counts and as metrics of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from urllib.parse import urlsplit

from spear_megatron.rollout.sglang.client import ServerClient, ServerStats

_TOTALS = {
    "engine/attempts": "num_attempts",
    "engine/sampled_tokens": "num_sampled_tokens",
    "engine/prompt_tokens": "num_prompt_tokens",
    "engine/cached_tokens": "num_cached_tokens",
    "engine/aborted": "num_aborted",
    "engine/lost": "num_lost",
}
_OF_ONE = {
    "engine_server/<server>/attempts": "num_attempts",
    "engine_server/<server>/sampled_tokens": "num_sampled_tokens",
    "engine_server/<server>/prompt_tokens": "num_prompt_tokens",
    "engine_server/<server>/cached_tokens": "num_cached_tokens",
    "engine_server/<server>/aborted": "num_aborted",
    "engine_server/<server>/lost": "num_lost",
}


class EngineStats:
    """Counts since the engine was made.

    Attributes:
        num_requests: calls of ``generate``.
        num_retries: attempts after the first of a request.
        num_moved_sessions: conversations that went to another server than before.
    """

    def __init__(self, clients: Sequence[ServerClient]) -> None:
        self.num_requests = 0
        self.num_retries = 0
        self.num_moved_sessions = 0
        self._clients = tuple(clients)
        self._taken: dict[str, float] = {}

    @property
    def by_server(self) -> dict[str, ServerStats]:
        """Counts by URL, live objects."""
        return {client.url: client.stats for client in self._clients}

    @property
    def total(self) -> ServerStats:
        """Counts over all servers."""
        names = [field.name for field in dataclasses.fields(ServerStats)]
        return ServerStats(**{name: sum(getattr(client.stats, name) for client in self._clients) for name in names})

    def take_metrics(self) -> dict[str, float]:
        """``engine/<figure>`` over all servers and ``engine_server/<host-port>/<figure>``, since the last call.

        ``servers_down`` is the number at the moment.
        """
        now: dict[str, float] = {
            "engine/requests": self.num_requests,
            "engine/retries": self.num_retries,
            "engine/moved_sessions": self.num_moved_sessions,
        }
        total = self.total
        now |= {key: getattr(total, field) for key, field in _TOTALS.items()}
        for url, stats in self.by_server.items():
            name = server_name(url)
            now |= {key.replace("<server>", name): getattr(stats, field) for key, field in _OF_ONE.items()}
        since = {key: float(value - self._taken.get(key, 0.0)) for key, value in now.items()}
        self._taken = now
        return since | {"engine/servers_down": float(sum(client.is_down for client in self._clients))}


def server_name(url: str) -> str:
    """Host and port of a URL as one word of letters, digits, dots and hyphens."""
    parts = urlsplit(url)
    return f"{parts.hostname}-{parts.port or {'http': 80, 'https': 443}[parts.scheme]}".replace(":", ".")
