"""A process group of one leader and the tensor ranks of all servers, for broadcasts outside of the trainer's groups."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.weights.servers import ServerGroup, Target

_POLL_S = 0.02
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class JoinError(EngineError):
    """A group did not come about; ``reasons`` has what each server that is to blame did, by URL."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = dict(reasons)


class BroadcastGroup:
    """Rank 0 of a group whose other ranks are the tensor ranks of servers; making it waits until all have joined.

    The store listens before a server is told of it. A server that waits in a group answers nothing, so every wait ends
    after ``timeout_s``, and a failure closes the store, which sends the servers that wait in it back to work.

    Args:
        name: of the group; no other group on these servers has it.
        address: of this host, as servers reach it; None takes the host's name, or loopback where all servers are.
        backend: gloo, or nccl for servers on GPUs.

    Raises:
        JoinError: not everybody joined in time; names the servers that did not.
    """

    def __init__(
        self,
        servers: ServerGroup,
        targets: Sequence[Target],
        *,
        name: str,
        address: str | None,
        backend: str,
        timeout_s: float,
    ) -> None:
        self.targets = tuple(targets)
        self.name = name
        self._servers = servers
        self._timeout = timedelta(seconds=timeout_s)
        self._backend = backend
        size = 1 + sum(target.tp_size for target in targets)
        self._store: dist.TCPStore | None = dist.TCPStore(
            "0.0.0.0", 0, size, True, self._timeout, wait_for_workers=False
        )
        place: dict[str, Any] = {
            "address": address or own_address([target.url for target in targets]),
            "port": self._store.port,
            "world_size": size,
            "name": name,
            "backend": backend,
            "timeout_s": timeout_s,
        }
        with ThreadPoolExecutor(len(targets), thread_name_prefix="join") as threads:
            joins: dict[str, Future[None]] = {}
            offset = 1
            for target in targets:
                client = servers.client(target.url)
                joins[target.url] = threads.submit(client.init_group, rank_offset=offset, **place)
                offset += target.tp_size
            try:
                self._await_announced(joins, time.monotonic() + timeout_s)
                self._group = self._join(size)
                self._check(joins)
            except (EngineError, RuntimeError) as error:  # RuntimeError: torch's, of a group that was not complete
                self._store = None  # closes it
                if isinstance(error, JoinError):
                    raise
                reason = f"group {name}: {error}"
                raise JoinError({target.url: reason for target in targets}) from error

    @staticmethod
    def _check(joins: dict[str, Future[None]], *, wait: bool = True) -> None:
        """Raise what servers answered that could not join."""
        done = {url: join for url, join in joins.items() if wait or join.done()}
        refused = {url: str(error) for url, join in done.items() if (error := join.exception()) is not None}
        if refused:
            raise JoinError(refused)

    def _await_announced(self, joins: dict[str, Future[None]], end: float) -> None:
        """Wait until every server rank has written its address to the store (gloo; nccl connects at first use)."""
        while (missing := self._missing_ranks()) and time.monotonic() < end:
            refused = {url for url, join in joins.items() if join.done() and join.exception() is not None}
            if all(self._has_come(url, missing) or url in refused for url in joins):
                break
            time.sleep(_POLL_S)
        # Not earlier: a server that finds the store closed already would try to reach it for as long as torch lets it.
        self._check(joins, wait=False)
        if missing:
            absent = [target.url for target in self.targets if not self._has_come(target.url, missing)]
            reason = (
                f"did not join the group {self.name} within {self._timeout.total_seconds():g} s; can it reach "
                "actor_rollout_ref.rollout.sglang.weights.master_address?"
            )
            raise JoinError({url: f"{url} {reason}" for url in absent})

    def _has_come(self, url: str, missing: set[int]) -> bool:
        """Whether all tensor ranks of a server are in the store."""
        offset = 1
        for target in self.targets:
            if target.url == url:
                return not missing & set(range(offset, offset + target.tp_size))
            offset += target.tp_size
        raise KeyError(url)

    def _missing_ranks(self) -> set[int]:
        if self._backend != "gloo":
            return set()
        assert self._store is not None
        written = {key.rpartition("/")[2] for key in self._store.list_keys() if key.startswith(f"{self.name}/")}
        ranks = range(1, 1 + sum(target.tp_size for target in self.targets))
        return {rank for rank in ranks if str(rank) not in written}

    def _join(self, size: int) -> dist.ProcessGroup:
        """This side of the group that SGLang's ``init_custom_process_group`` makes: same prefix, own rank 0."""
        store = dist.PrefixStore(self.name, self._store)
        group, _ = c10d._new_process_group_helper(
            size, 0, [], dist.Backend(self._backend), store, group_name=self.name, timeout=self._timeout
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        return group

    def broadcast(self, flat: torch.Tensor) -> Any:
        """Start sending ``flat`` to everybody; returns the work to wait for."""
        return dist.broadcast(flat, group=self._group, group_src=0, async_op=True)

    def close(self, *, broken: bool = False) -> None:
        """Leave the group, and let the servers that have not failed leave it.

        At the same time on both sides: nccl waits for the other, and a server that still waits in a broadcast hears
        nothing before this side has left. gloo leaves when a broadcast under way is done, or late.

        Args:
            broken: a broadcast under way will never end. nccl waits for it unless it is told to break off.
        """
        leave_group = c10d._abort_process_group if broken and self._backend == "nccl" else dist.destroy_process_group
        urls = [target.url for target in self.targets]

        def leave(client: ControlClient) -> None:
            with contextlib.suppress(EngineError):  # a restarted server has left it already
                client.destroy_group(self.name)

        with ThreadPoolExecutor(1, thread_name_prefix="leave") as threads:
            told = threads.submit(self._servers.each, urls, leave)
            leave_group(self._group)
            self._store = None
            told.result()


def own_address(urls: Sequence[str]) -> str:
    """How servers can name this host: loopback where all of them are on it, else its host name."""
    if all(urlsplit(url).hostname in _LOOPBACK for url in urls):
        return "127.0.0.1"
    return socket.getfqdn()
