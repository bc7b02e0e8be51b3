"""Decisions that all ranks take together, and waiting for a busy leader with deadline and heartbeat."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from spear_megatron.parallel.errors import RunError, RunTimeout
from spear_megatron.parallel.state import ParallelState

T = TypeVar("T")

HEARTBEAT_S = 2.0
HEARTBEAT_LOST_S = 120.0
POLL_S = 0.02


def agree_ok(parallel: ParallelState, phase: str, error: str | None) -> None:
    """Raise the same error on every rank when any rank reports one.

    Raises:
        RunError: names the phase and the failing ranks with their messages.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(gather_objects(parallel, error)):
        if text is not None:
            ranks_of.setdefault(text, []).append(rank)
    if ranks_of:
        reasons = "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items())
        raise RunError(f"{phase} failed. {reasons}")


@contextlib.contextmanager
def agreed(parallel: ParallelState, phase: str) -> Iterator[None]:
    """Run a body without collectives on every rank; when it fails on any of them, all raise, so that none waits.

    Raises:
        RunError: as :func:`agree_ok`; a process alone lets its own error through.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if parallel.world_size > 1:
            agree_ok(parallel, phase, str(error))
        raise
    agree_ok(parallel, phase, None)


def agree_any(parallel: ParallelState, flag: bool) -> bool:
    """True on every rank when any rank says True."""
    return any(gather_objects(parallel, bool(flag)))


def gather_objects(parallel: ParallelState, value: T) -> list[T]:
    """Small picklable values of every rank, in rank order (CPU group)."""
    if parallel.world_size == 1:
        return [value]
    values: list[Any] = [None] * parallel.world_size
    with parallel.waits.waiting():
        dist.all_gather_object(values, value, group=parallel.cpu_group)
    return values


@contextlib.contextmanager
def heartbeat(parallel: ParallelState, phase: str) -> Iterator[None]:
    """Tell peers in :func:`wait_for_leaders`, through the store, that this rank is alive while the body works.

    A thread of its own does it, so that a long computation passes for no death.
    """
    if parallel.world_size == 1:
        yield
        return
    key, over = f"{phase}/{parallel.rank}", threading.Event()

    def beat() -> None:
        for count in itertools.count():
            parallel.store.set(f"{key}/beat", str(count))
            if over.wait(HEARTBEAT_S):
                return

    thread = threading.Thread(target=beat, name=f"heartbeat-{phase}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        parallel.store.set(f"{key}/done", "1")


def wait_for_leaders(parallel: ParallelState, phase: str, leaders: list[int], timeout_s: float) -> None:
    """Wait, outside any collective, until every leader has finished ``phase``.

    Raises:
        RunTimeout: names the phase, the leader and what was last heard of it.
    """
    with parallel.waits.waiting():
        _wait_for_leaders(parallel, phase, leaders, timeout_s)


def _wait_for_leaders(parallel: ParallelState, phase: str, leaders: list[int], timeout_s: float) -> None:
    start = time.monotonic()
    for leader in leaders:
        key = f"{phase}/{leader}"
        heard, beat = start, None
        while not parallel.store.check([f"{key}/done"]):
            now = time.monotonic()
            newest = parallel.store.get(f"{key}/beat") if parallel.store.check([f"{key}/beat"]) else None
            if newest != beat:  # only changes count: the clocks of two machines may be minutes apart
                heard, beat = now, newest
            if now - start > timeout_s or now - heard > HEARTBEAT_LOST_S:
                raise RunTimeout(
                    f"rank {parallel.rank} waited {now - start:.0f} s in phase '{phase}' for rank {leader}, "
                    f"last heard of {now - heard:.0f} s ago"
                )
            time.sleep(POLL_S)


def forget_heartbeat(parallel: ParallelState, phase: str) -> None:
    """Remove every sign of ``phase`` from the store, so that it may come again and the store does not grow.

    Collective, after another collective that follows the wait: no rank may still look for the signs.
    """
    if parallel.world_size > 1:
        for sign in ("beat", "done"):
            parallel.store.delete_key(f"{phase}/{parallel.rank}/{sign}")
        gather_objects(parallel, None)
