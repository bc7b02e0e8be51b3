"""Buckets as broadcasts from a leader to all servers at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist

from spear_megatron.rollout.engine import EngineError
from spear_megatron.weights.memory import host_bytes
from spear_megatron.weights.payload import FLATTENED
from spear_megatron.weights.plan import Bucket
from spear_megatron.weights.servers import COLLATERAL, ServerGroup, Target
from spear_megatron.weights.ways.broadcast_group import BroadcastGroup, JoinError

_POLL_S = 0.002


class Turns:
    """Lets leaders send bucket after bucket in one order: two at a time could each wait in another server for ever.

    Args:
        store: of the whole job.
        key: of this update; no other turns have it.
    """

    def __init__(self, store: dist.Store, key: str, timeout_s: float) -> None:
        self._store = store
        self._key = key
        self._timeout_s = timeout_s

    def wait(self, position: int) -> None:
        """Wait until ``position`` buckets were passed.

        Raises:
            EngineError: not in time; says which bucket it waits for.
        """
        end = time.monotonic() + self._timeout_s
        while (done := self._store.add(self._key, 0)) < position:
            if time.monotonic() > end:
                raise EngineError(f"bucket {position} waited {self._timeout_s:g} s for its turn, bucket {done} is late")
            time.sleep(_POLL_S)

    def passed(self) -> None:
        """The bucket whose turn it was is done, well or not."""
        self._store.add(self._key, 1)


class DistributedWay:
    """``update_weights_from_distributed``: one broadcast of flat bytes per bucket, in a group of this leader's own.

    The group is kept while the servers are the same. A server that fails breaks the group for all.

    Args:
        leader: number of this leader, in the name of its groups.
        turns: makes the turns of an update; None where there is only one leader.
    """

    needs_session = True
    published_folder = None

    def __init__(
        self,
        group: ServerGroup,
        dtype: torch.dtype,
        device: torch.device,
        *,
        leader: int,
        address: str | None,
        run_name: str,
        turns: Callable[[str], Turns] | None,
    ) -> None:
        self._servers = group
        self._dtype = dtype
        self._device = device
        self._leader = leader
        self._address = address
        self._run_name = run_name
        self._turns_of = turns
        self._turns: Turns | None = None
        self._targets: tuple[Target, ...] = ()
        self._version = 0
        self._numbers = itertools.count()
        self._updates = itertools.count()
        self._broadcasts: BroadcastGroup | None = None

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Host memory for a bucket, uint8 [num_bytes]."""
        return host_bytes(num_bytes)

    def begin(self, targets: Sequence[Target], version: int) -> None:
        """Form this leader's group, unless it has one with just these servers, none of which was restarted since."""
        restarted = any(target.label != str(self._version) for target in targets)
        self._version = version
        self._targets = tuple(targets)
        update = next(self._updates)
        self._turns = self._turns_of(f"weights/turn/{update}") if self._turns_of else None
        if self._broadcasts is not None and (restarted or self._broadcasts.targets != self._targets):
            self._broadcasts.close()
            self._broadcasts = None
        if self._broadcasts is None:
            self._form()

    def _form(self) -> None:
        healthy = set(self._servers.healthy([target.url for target in self._targets]))
        self._targets = tuple(target for target in self._targets if target.url in healthy)
        if not self._targets:
            return
        name = f"{self._run_name}-{self._leader}-{next(self._numbers)}"
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        try:
            self._broadcasts = BroadcastGroup(
                self._servers,
                self._targets,
                name=name,
                address=self._address,
                backend=backend,
                timeout_s=self._servers.timeout_s,
            )
        except JoinError as error:
            for url, reason in error.reasons.items():
                self._servers.fail(url, reason)
            self._fail_all()

    def send(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Broadcast one bucket, when it is its turn."""
        if self._turns is None:
            self._broadcast(bucket, flat, None)
            return
        try:
            self._turns.wait(bucket.index)
            self._broadcast(bucket, flat, None)
        except EngineError as error:
            self._fail_all(str(error))
        finally:
            self._turns.passed()

    def send_closing(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Broadcast the bucket that completes the update, with the version."""
        self._broadcast(bucket, flat, str(self._version))

    def _broadcast(self, bucket: Bucket, flat: torch.Tensor, label: str | None) -> None:
        urls = [target.url for target in self._targets]
        if self._broadcasts is None or self._servers.healthy(urls) != urls:
            self._fail_all()
            return
        group = self._broadcasts
        tensors = [(e.name, str(self._dtype).removeprefix("torch."), e.shape) for e in bucket.entries]
        with ThreadPoolExecutor(len(urls), thread_name_prefix="receive") as threads:
            posts: dict[str, Future[None]] = {
                url: threads.submit(
                    self._servers.client(url).update_from_group,
                    tensors,
                    name=group.name,
                    load_format=FLATTENED,
                    version=label,
                    flush=False,
                )
                for url in urls
            }
            self._complete(group, flat, posts)

    def _complete(self, group: BroadcastGroup, flat: torch.Tensor, posts: dict[str, Future[None]]) -> None:
        """Broadcast while the servers receive; the first server that fails ends the group, which wakes the others."""
        work = group.broadcast(flat)
        end = time.monotonic() + self._servers.timeout_s
        while not all(post.done() for post in posts.values()):
            if any(post.done() and post.exception() for post in posts.values()) or time.monotonic() > end:
                break
            time.sleep(_POLL_S)
        failed = {url: post for url, post in posts.items() if not post.done() or post.exception()}
        for url, post in failed.items():
            if post.done():
                self._servers.fail(url, str(post.exception()))
        if failed:
            self.abandon()
            self._fail_all()
        else:
            work.wait()

    def _fail_all(self, reason: str = COLLATERAL) -> None:
        for target in self._targets:
            self._servers.fail(target.url, reason)

    def abandon(self) -> None:
        """Break the group: servers that wait in a broadcast get an error."""
        if self._broadcasts is not None:
            self._broadcasts.close(broken=True)
            self._broadcasts = None

    def close(self) -> None:
        """Dissolve the group at the end of the run; the servers may be used by another one."""
        if self._broadcasts is not None:
            self._servers.forget_failures([target.url for target in self._broadcasts.targets])
            self._broadcasts.close()
            self._broadcasts = None
