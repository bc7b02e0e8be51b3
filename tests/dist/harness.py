"""Runs a module-level function on N gloo ranks, in worker processes that are kept for the next test."""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_DIRECTORY = str(Path(__file__).resolve().parent)
_START_DEADLINE_S = 180.0


class RankError(AssertionError):
    """One or more ranks failed; the message holds every rank's traceback."""


class _Worker:
    def __init__(self, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.jobs: Any = context.SimpleQueue()
        self.results: Any = context.Queue()
        self.process = context.Process(
            target=_serve, args=(index, self.jobs, self.results), name=f"rank-{index}", daemon=True
        )
        self.process.start()


class Pool:
    """Worker processes that serve one job at a time. A job's ranks see exactly torchrun's environment variables."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, function: Callable[..., Any], world_size: int, args: tuple, deadline_s: float) -> list[Any]:
        """Results of ``function(*args)`` by rank. Raises RankError; a failed or late job ends all workers."""
        import torch.distributed as dist

        deadline = time.monotonic() + deadline_s
        if len(self._workers) < world_size:
            deadline += _START_DEADLINE_S  # new workers first import torch and megatron-core
            self._workers += [_Worker(index) for index in range(len(self._workers), world_size)]
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        for worker in self._workers[:world_size]:
            worker.jobs.put((store.port, world_size, function.__module__, function.__qualname__, args))
        outcomes = self._collect(world_size, deadline)
        errors = [f"--- rank {rank} ---\n{text}" for rank, (ok, text) in sorted(outcomes.items()) if not ok]
        late = [rank for rank in range(world_size) if rank not in outcomes]
        if errors or late:
            self.close()
            if late:
                reason = "were stopped after the failure" if errors else f"did not answer in {deadline_s:.0f} s"
                errors.append(f"ranks {late} of {function.__qualname__} {reason}")
            raise RankError("\n".join(errors))
        return [outcomes[rank][1] for rank in range(world_size)]

    def _collect(self, world_size: int, deadline: float) -> dict[int, tuple[bool, Any]]:
        """Answers that arrive before the deadline; after a first error the others get 5 s more to tell theirs."""
        outcomes: dict[int, tuple[bool, Any]] = {}
        while len(outcomes) < world_size and time.monotonic() < deadline:
            for rank in range(world_size):
                if rank in outcomes:
                    continue
                try:
                    outcomes[rank] = self._workers[rank].results.get(timeout=0.02)
                except queue.Empty:
                    process = self._workers[rank].process
                    if not process.is_alive():
                        outcomes[rank] = (False, f"the process died with exit code {process.exitcode}")
                if rank in outcomes and not outcomes[rank][0]:
                    deadline = min(deadline, time.monotonic() + 5.0)
        return outcomes

    def close(self) -> None:
        """End every worker; the next job starts new ones."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        self._workers.clear()


_pool: Pool | None = None


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, deadline_s: float = 120.0) -> list[Any]:
    """Call the module-level ``function(*args)`` on ``world_size`` ranks; returns the results in rank order.

    The function calls ``spear_megatron.parallel.state.initialize`` itself (RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT are set) and must return something picklable. Groups left open are destroyed afterwards.

    Raises:
        RankError: a rank raised, died, or did not answer within ``deadline_s``; shows every rank's traceback.
    """
    global _pool
    if _pool is None:
        _pool = Pool()
        atexit.register(_pool.close)
    return _pool.run(function, world_size, args, deadline_s)


def _serve(index: int, jobs: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent hosts the store, as torchrun does
        OMP_NUM_THREADS="1",
    )
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    while True:
        port, world_size, module, name, args = jobs.get()
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        os.environ["MASTER_PORT"] = str(port)
        try:
            results.put((True, _call(module, name, args)))
        except BaseException:  # noqa: BLE001  every failure, SystemExit included, belongs in the test's report
            results.put((False, traceback.format_exc()))
        # A process group lives in cycles with the model it served; each one left behind keeps a polling gloo thread.
        gc.collect()


def _end_with_the_parent() -> None:
    """A parent that was killed closes nothing: without this its workers would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(module: str, name: str, args: tuple) -> Any:
    import torch.distributed as dist

    tests = str(Path(_DIRECTORY).parent)
    for directory in (tests, _DIRECTORY, str(Path(tests) / "unit"), str(Path(tests) / "e2e")):
        if directory not in sys.path:
            sys.path.append(directory)
    try:
        return getattr(importlib.import_module(module), name)(*args)
    finally:
        from megatron.core import parallel_state as mpu

        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
