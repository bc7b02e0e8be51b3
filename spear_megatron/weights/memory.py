"""Memory of gathered weights: buffers that are used again, and a count of the bytes that are alive."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Ledger:
    """Bytes of gathered weights alive on this rank, and the most there ever were."""

    def __init__(self) -> None:
        self.alive = 0
        self.peak = 0

    def hold(self, num_bytes: int) -> None:
        """Count memory from now on."""
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)

    def release(self, num_bytes: int) -> None:
        """Count memory no more."""
        self.alive -= num_bytes


class BufferPool:
    """Flat buffers of ``size`` bytes that are used again: fresh pages cost more than the copy into them.

    Args:
        size: bytes of a buffer that is kept; a larger one is made for the occasion and dropped.
        ledger: counts what is taken, by the bytes asked for.
        allocate: makes a uint8 buffer of so many bytes (plain memory, shared memory, a device).
    """

    def __init__(self, size: int, ledger: Ledger, allocate: Callable[[int], torch.Tensor]) -> None:
        self._size = size
        self._ledger = ledger
        self._allocate = allocate
        self._free: list[torch.Tensor] = []
        self._taken: dict[int, torch.Tensor] = {}

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, uint8 [num_bytes], with any content."""
        if num_bytes <= self._size and self._free:
            whole = self._free.pop()
        else:
            whole = self._allocate(max(num_bytes, self._size))
        part = whole[:num_bytes]
        self._taken[id(part)] = whole
        self._ledger.hold(num_bytes)
        return part

    def give_back(self, part: torch.Tensor) -> None:
        """Return what :meth:`take` gave; its content may change from now on."""
        whole = self._taken.pop(id(part))
        self._ledger.release(part.numel())
        if whole.numel() == self._size:
            self._free.append(whole)


def host_bytes(num_bytes: int) -> torch.Tensor:
    """Plain host memory, uint8 [num_bytes]."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def shared_bytes(num_bytes: int) -> torch.Tensor:
    """Shared memory that another process of this host can open by its name, uint8 [num_bytes]."""
    storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,))
