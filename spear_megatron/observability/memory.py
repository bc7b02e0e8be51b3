"""Peak memory of every phase of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from spear_megatron.device.host_memory import reset_peak, status_bytes

MIB = 1 << 20


class MemoryMeter:
    """Peak memory per phase, in MiB: of this process's CUDA allocator, or of its resident set where it has no device.

    The peak is reset at the start of every phase, so that a phase shows what it needs itself, on top of what stays
    allocated. Phases may repeat (the largest counts) but not nest. Where the kernel lets nobody reset the peak of the
    resident set nothing is measured.
    """

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._peaks: dict[str, float] = {}
        self.available = cuda or self._reset()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block under ``name``."""
        if not self.available:
            yield
            return
        self._reset()
        try:
            yield
        finally:
            self._peaks[name] = max(self._peaks.get(name, 0.0), self._peak())

    def take(self) -> dict[str, float]:
        """Peaks in MiB by phase since the last call."""
        peaks, self._peaks = self._peaks, {}
        return peaks

    def _reset(self) -> bool:
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return True
        try:
            reset_peak()
        except OSError:
            return False
        return True

    def _peak(self) -> float:
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated() / MIB
        return status_bytes("VmHWM") / MIB
