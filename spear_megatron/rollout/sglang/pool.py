"""Which server serves a request: the one that holds the conversation's prefix, else the least loaded that answers."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.client import ServerClient
from spear_megatron.rollout.sglang.config import SGLangConfig

_MAX_SESSIONS = 100_000  # the longest unused one is forgotten
_POLL_S = 0.05


class ServerPool:
    """Choice among servers, with affinity of sessions and a watch over the servers' health.

    All calls come from one asyncio loop. :meth:`watch` runs in a task of its own.
    """

    def __init__(self, clients: Sequence[ServerClient], settings: SGLangConfig) -> None:
        if not clients:
            raise ValueError("a pool needs at least one server")
        self.clients = tuple(clients)
        self.num_moved_sessions = 0
        self._settings = settings
        self._homes: OrderedDict[str, ServerClient] = OrderedDict()
        self._failures = dict.fromkeys(self.clients, 0)
        self._required_label: str | None = None
        self._stale: dict[str, str] = {}
        self._lacked: set[str] = set()  # stale servers that were seen without the label since

    def require_label(self, label: str) -> None:
        """From now on a server that was down comes back only with weights of this label."""
        self._required_label = label

    def set_stale(self, reasons: Mapping[str, str]) -> None:
        """Servers, by URL with the reason, that get nothing until this is called again or they are seen to get the
        required label: one that has it already may be paused, or hold half of an update."""
        self._stale, self._lacked = dict(reasons), set()

    async def choose(self, session: str) -> ServerClient:
        """The server for the next request of ``session``.

        A session stays at its server, for its prefix cache, unless that is down, or full while another has room. Where
        no server is up the call waits ``request_timeout_s`` for one.

        Raises:
            EngineError: none came back in time; names them and why they are down.
        """
        end = time.monotonic() + self._settings.request_timeout_s
        while (best := self._least_loaded()) is None:
            if time.monotonic() >= end:
                whys = ((client.url, self._stale.get(client.url) or client.down_reason) for client in self.clients)
                reasons = "; ".join(f"{url}: {why}" for url, why in whys)
                limit = f"sglang.request_timeout_s={self._settings.request_timeout_s:g} s"
                raise EngineError(f"no SGLang server came back within {limit} ({reasons})")
            await asyncio.sleep(_POLL_S)
        home = self._homes.get(session)
        if home is None or not self._may_serve(home) or (_is_full(home) and not _is_full(best)):
            self.num_moved_sessions += home is not None
            home = self._homes[session] = best
        self._homes.move_to_end(session)
        if len(self._homes) > _MAX_SESSIONS:
            self._homes.popitem(last=False)
        return home

    def _least_loaded(self) -> ServerClient | None:
        up = [client for client in self.clients if self._may_serve(client)]
        return min(up, key=lambda client: client.load, default=None)

    def _may_serve(self, client: ServerClient) -> bool:
        return not client.is_down and client.url not in self._stale

    async def suspect(self, client: ServerClient) -> None:
        """Check a server at once that failed to answer, and send nothing more to it if it does not answer again."""
        if not client.is_down and not await client.is_healthy(self._settings.health_timeout_s):
            client.mark_down("it did not answer a request, nor the health check after it")

    async def watch(self) -> None:
        """Check every server every ``health_interval_s``, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.health_interval_s)
            await asyncio.gather(*(self._check(client) for client in self.clients))

    async def _check(self, client: ServerClient) -> None:
        healthy = await client.is_healthy(self._settings.health_timeout_s)
        self._failures[client] = 0 if healthy else self._failures[client] + 1
        if self._failures[client] >= self._settings.health_failures:
            client.mark_down(f"{self._failures[client]} health checks in a row failed")
        elif healthy and client.is_down and await self._has_weights(client):
            client.mark_up()
        if client.url in self._stale:
            if not healthy or not await self._has_weights(client):
                self._lacked.add(client.url)
            elif client.url in self._lacked:
                self._stale.pop(client.url, None)

    async def _has_weights(self, client: ServerClient) -> bool:
        """Whether a restarted server already has the weights that the others have."""
        if self._required_label is None:
            return True
        try:
            model = await client.get("/get_model_info")
        except EngineError:
            return False
        return isinstance(model, dict) and str(model.get("weight_version")) == self._required_label


def _is_full(client: ServerClient) -> bool:
    return client.load >= client.max_in_flight
