"""What watches a run from the inside: sign of life, hang detection, stragglers, peak memory, profiler window."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spear_megatron.observability.heartbeat import HeartbeatFile, Watchdog
from spear_megatron.observability.memory import MemoryMeter
from spear_megatron.observability.stragglers import straggler_metrics
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState
from spear_megatron.trainer.run_config import TrainerConfig

LEADERS_ONLY = "gen"
"""The phase in which ranks that are no leaders only wait."""


class Watch:
    """Follows the phases of one rank. Nothing runs before :meth:`start`."""

    def __init__(self, trainer: TrainerConfig, parallel: ParallelState) -> None:
        self._trainer, self._parallel = trainer, parallel
        self._file = HeartbeatFile(trainer.default_local_dir, parallel.rank)
        self._memory: MemoryMeter | None = None
        self._busy: dict[str, float] = {}
        self._step = 0
        self._phase = "start"
        self._started = False
        self._watchdog: Watchdog | None = None
        self._profiler: Any = None

    def start(self) -> None:
        """Write the first sign and start the watchdog, if there is one."""
        trainer, self._started = self._trainer, True
        self._memory = MemoryMeter(cuda=self._parallel.platform.is_cuda)
        if trainer.hang_timeout_s > 0:
            self._watchdog = Watchdog(
                trainer.default_local_dir, self._parallel.rank, trainer.hang_timeout_s, trainer.hang_action
            )
        self._mark("start")

    def close(self) -> None:
        """End the watchdog and a profile under way; the last sign says that the run is over."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        if self._started:
            self._file.write(self._step, "ended")
            self._started = False
        self._end_profile()

    def begin_step(self, step: int) -> None:
        """``step`` begins."""
        self._step = step
        self._mark("step")
        window = self._trainer.profile.steps
        if window and step >= window[1]:
            self._end_profile()
        wanted = bool(window) and self._parallel.rank in self._trainer.profile.ranks
        if wanted and window[0] <= step < window[1] and self._profiler is None:
            self._begin_profile()

    def beat(self) -> None:
        """Progress inside a phase; no file is written."""
        if self._watchdog is not None:
            self._watchdog.beat(self._step, self._phase)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Follow one phase; phases do not nest."""
        if self._memory is None:
            yield
            return
        self._mark(name)
        waited, start = self._parallel.waits.seconds, time.perf_counter()
        try:
            with self._memory.phase(name):
                yield
        finally:
            if name != LEADERS_ONLY or self._parallel.is_leader:
                own = time.perf_counter() - start - (self._parallel.waits.seconds - waited)
                self._busy[name] = self._busy.get(name, 0.0) + own
            self._mark("between phases")

    def take(self, step_s: float) -> dict[str, float]:
        """Stragglers and peak memory since the last call, over all ranks. Collective."""
        own = (self._busy, self._memory.take() if self._memory is not None else {})
        self._busy = {}
        parts = gather_objects(self._parallel, own)
        peaks: dict[str, float] = {}
        for _, part in parts:
            for name, value in part.items():
                peaks[f"perf/memory/{name}"] = max(peaks.get(f"perf/memory/{name}", 0.0), value)
        return {**straggler_metrics([busy for busy, _ in parts], step_s), **peaks}

    def _mark(self, phase: str) -> None:
        self._phase = phase
        self.beat()
        if self._started and phase != "between phases":
            self._file.write(self._step, phase)

    def _begin_profile(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._parallel.platform.is_cuda:
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.__enter__()

    def _end_profile(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        first, after = self._trainer.profile.steps
        folder = Path(self._trainer.default_local_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank_{self._parallel.rank}_steps_{first}_{after - 1}.json"))
