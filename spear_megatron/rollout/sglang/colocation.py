"""Servers on the trainer's own GPUs: who holds the memory when. Generation and training take turns.

After generation: cache flushed (a server that is not idle may die of the next request), cache and weights released,
then the trainer's optimizer states come back. Before a publication: optimizer states to the host, weights of servers
resumed, updated; then their caches. Every change of hands is agreed on by all ranks, so that nobody takes what is not
given yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from spear_megatron.parallel.agreement import agree_ok
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.rollout.sglang.fleet import Fleet
from spear_megatron.rollout.sglang.member import Endpoint

WEIGHTS, CACHE = ("weights",), ("kv_cache",)


class Offloadable(Protocol):
    """The part of the trainer that gives its device memory away while servers generate."""

    def to_host(self) -> None:
        """Move it to host memory; harmless if it is there."""
        ...

    def to_device(self) -> None:
        """Move it back; harmless if it is there."""
        ...


class SharedGpus:
    """Passes the GPUs between this rank's trainer and the servers that this rank started. Calls are collective.

    Args:
        fleet: the servers of this rank, None on ranks that started none.
        trainer: what this rank offloads.
        timeout_s: deadline of one request, and of the wait for a server to be idle.
        cache_first: resume caches together with weights, before the update: for publishers that let servers score
            prompts while they publish. Costs their memory during the update.
    """

    def __init__(
        self,
        parallel: ParallelState,
        fleet: Fleet | None,
        trainer: Offloadable,
        *,
        timeout_s: float = 60.0,
        cache_first: bool = False,
    ) -> None:
        self._parallel = parallel
        self._fleet = fleet
        self._trainer = trainer
        self._timeout_s = timeout_s
        self._cache_first = cache_first
        self._released: tuple[Endpoint, ...] = ()
        self._training = False
        self._quiet = contextlib.ExitStack()
        self._held = contextlib.ExitStack()

    def to_training(self) -> None:
        """Generation is over: servers give their memory, the trainer takes it. Nothing happens the second time.

        Raises:
            RunError: a rank could not; on all of several ranks.
            EngineError: a server could neither release its memory nor be ended.
        """
        if self._training:
            return
        problem: str | None = None
        if self._fleet is not None:
            try:
                self._quiet.enter_context(self._fleet.quiet())
                self._held.enter_context(self._fleet.without_starts())
                self._released = self._on_each(self._fleet.reachable(), self._release)
            except EngineError as error:
                problem = str(error)
        self._agree("release of the servers' memory", problem)
        self._trainer.to_device()
        self._training = True

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """The body sends new weights to the servers, which generate afterwards."""
        self._trainer.to_host()
        self._agree("offloading of the optimizer", None)
        self._held.close()  # servers that died meanwhile start now, and can take the weights
        try:
            tags = (*WEIGHTS, *CACHE) if self._cache_first else WEIGHTS
            self._resume(tags, "weights")
            yield
            if not self._cache_first:
                self._resume(CACHE, "cache")
        finally:
            self._quiet.close()
            self._released, self._training = (), False

    def _resume(self, tags: Sequence[str], what: str) -> None:
        problem: str | None = None
        if self._fleet is not None:
            try:
                self._released = self._on_each(self._released, lambda control: control.resume_memory(tags))
            except EngineError as error:
                problem = str(error)
        self._agree(f"resuming the servers' {what}", problem)

    def _release(self, control: ControlClient) -> None:
        control.flush_cache(self._timeout_s)
        control.release_memory((*CACHE, *WEIGHTS))

    def _on_each(
        self, endpoints: Sequence[Endpoint], call: Callable[[ControlClient], None]
    ) -> tuple[Endpoint, ...]:
        """Endpoints at which ``call`` worked. A server at which it failed is ended, and replaced when there is room."""
        assert self._fleet is not None
        done = []
        for endpoint in endpoints:
            control = ControlClient(endpoint.url, timeout_s=self._timeout_s)
            try:
                call(control)
                done.append(endpoint)
            except EngineError as error:
                self._fleet.condemn(endpoint, str(error), self._timeout_s)
            finally:
                control.close()
        return tuple(done)

    def _agree(self, phase: str, problem: str | None) -> None:
        if problem is not None and self._parallel.world_size == 1:
            raise EngineError(problem)
        agree_ok(self._parallel, phase, problem)
