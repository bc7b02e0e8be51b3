"""The servers of one update: asked before it, paused during it, checked after it. Failures are kept by server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient, PauseMode, flush_paused

T = TypeVar("T")
COLLATERAL = "its group of broadcasts was broken by another server"
"""Why a server failed that did nothing wrong: it may be tried again at once."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that takes part in an update.

    Attributes:
        tp_size: its tensor-parallel size.
        label: version that it named before; a restarted server has forgotten the last one.
    """

    url: str
    tp_size: int
    label: str = field(default="", compare=False)


class ServerGroup:
    """Control connections to servers, by URL, with the first failure of each since :meth:`forget_failures`.

    A server that failed is asked nothing more until then. The servers are asked at the same time, one thread each.
    """

    def __init__(self, *, timeout_s: float, connect: Callable[[str], ControlClient] | None = None) -> None:
        self.connect = connect or (lambda url: ControlClient(url, timeout_s=timeout_s))
        self._clients: dict[str, ControlClient] = {}
        self.timeout_s = timeout_s
        self.failures: dict[str, str] = {}

    def client(self, url: str) -> ControlClient:
        """The connection to a server, opened when first used."""
        if url not in self._clients:
            self._clients[url] = self.connect(url)
        return self._clients[url]

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def forget_failures(self, urls: Iterable[str]) -> None:
        """Ask these servers again."""
        for url in urls:
            self.failures.pop(url, None)

    def fail(self, url: str, reason: str) -> None:
        """Keep why a server cannot go on; the first reason stays."""
        self.failures.setdefault(url, reason)

    def healthy(self, urls: Iterable[str]) -> list[str]:
        """Those of ``urls`` that have not failed."""
        return [url for url in urls if url not in self.failures]

    def each(self, urls: Sequence[str], action: Callable[[ControlClient], T]) -> dict[str, T]:
        """Results of ``action`` by URL, of the healthy servers that answered; the failures of others are kept."""
        wanted = self.healthy(urls)
        if not wanted:
            return {}
        results: dict[str, T] = {}
        clients = [self.client(url) for url in wanted]
        with ThreadPoolExecutor(len(wanted), thread_name_prefix="server") as threads:
            calls = [threads.submit(action, client) for client in clients]
            for url, call in zip(wanted, calls, strict=True):
                try:
                    results[url] = call.result()
                except EngineError as error:
                    self.fail(url, str(error))
        return results


def find_targets(group: ServerGroup, urls: Sequence[str], shape: ModelShape) -> list[Target]:
    """The servers that answer and hold this model; the others are kept as failures.

    A server ignores names that it does not know and dies of a wrong shape, so its model folder is compared where it
    can be read here.
    """
    infos = group.each(urls, lambda client: client.server_info())
    for url, info in infos.items():
        problem = model_problem(info.model_path, shape)
        if problem is not None:
            group.fail(url, problem)
    return [Target(url, infos[url].tp_size, infos[url].weight_version) for url in group.healthy(infos)]


def model_problem(folder: str, shape: ModelShape) -> str | None:
    """Why a server that was started with ``folder`` cannot take weights of ``shape``; None if nothing is against it."""
    if not (Path(folder) / "config.json").is_file():
        return None
    try:
        other = ModelShape.from_folder(folder)
    except ValueError as error:
        return f"its model cannot be read: {error}"
    here, there = shape.parameter_shapes(), other.parameter_shapes()
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            return (
                f"its model {folder} needs {name} of shape {there.get(name)}, the trainer sends {here.get(name)}: "
                "start it with actor_rollout_ref.model.path"
            )
    return None


def open_update(group: ServerGroup, urls: Sequence[str], *, mode: PauseMode, session: bool) -> None:
    """Pause the servers, empty their caches, and open a session of updates where ``session``.

    The cache is emptied here and never by an update: an update that must empty the cache while requests are resident
    kills the server. Requests kept ``in_place`` keep their cache, and so does the server.
    """

    def opened(client: ControlClient) -> None:
        client.pause(mode)
        if mode != "in_place":
            flush_paused(client, group.timeout_s)
        if session:
            try:
                client.begin_update()
            except EngineError:
                client.end_update()  # of an update that was cut off
                client.begin_update()

    group.each(urls, opened)


def close_update(group: ServerGroup, urls: Sequence[str], *, session: bool) -> None:
    """Close the session and let the servers generate again. Servers that failed stay paused: theirs is a mixture."""

    def closed(client: ControlClient) -> None:
        if session:
            client.end_update()
        client.resume()

    group.each(urls, closed)


def check_versions(group: ServerGroup, urls: Sequence[str], version: int) -> None:
    """Every server must name ``version`` as that of its weights; one that does not has failed."""
    for url, info in group.each(urls, lambda client: client.server_info()).items():
        if info.weight_version != str(version):
            group.fail(url, f"it names version {info.weight_version!r} after an update to {version}")


def failure_text(failures: Mapping[str, str]) -> str:
    """All failures in one line."""
    return "; ".join(f"{url}: {reason}" for url, reason in sorted(failures.items()))
