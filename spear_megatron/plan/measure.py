"""Measures live tensor bytes, and a process's memory: the other side of a prediction."""

from __future__ import annotations

import gc
import weakref
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spear_megatron.device.host_memory import M_MMAP_THRESHOLD, reset_peak, status_bytes, tell_allocator


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation returned and that is still referenced.

    A storage counts once however many tensors view it, from the operation that returned it until it is freed. What an
    operation allocates and frees inside itself is not seen, nor memory outside of torch.

    Attributes:
        live: bytes now. peak: most bytes since the last :meth:`reset_peak`.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self._known: set[int] = set()
        self.live = 0
        self.peak = 0

    def reset_peak(self) -> None:
        """Start a new phase."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device:
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class ProcessBytes:
    """Resident memory of this process above what it had when the context was entered (Linux).

    While it lasts glibc maps every larger block by itself and gives it back when it is freed, so that a phase shows
    what it needs and not what an earlier one left behind.

    Attributes:
        peak: most bytes since the last :meth:`reset_peak`.

    Raises:
        OSError: on entering, the kernel does not let a process reset its own peak.
    """

    def __init__(self) -> None:
        self._baseline = 0

    def __enter__(self) -> ProcessBytes:
        tell_allocator("mallopt", M_MMAP_THRESHOLD, 1 << 16)
        self.reset_peak()
        self._baseline = status_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tell_allocator("mallopt", M_MMAP_THRESHOLD, 1 << 25)

    def reset_peak(self) -> None:
        """Start a new phase."""
        gc.collect()
        tell_allocator("malloc_trim", 0)
        reset_peak()

    @property
    def peak(self) -> int:
        return status_bytes("VmHWM") - self._baseline
