"""Memory of a process as Linux tells it, and what glibc's allocator keeps of it."""

from __future__ import annotations

import ctypes
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of ``mallopt``, from malloc.h of glibc."""
_KEEP_BYTES = 2**31 - 1


def status_bytes(field: str, pid: int | str = "self") -> int:
    """Bytes of one line of ``/proc/PID/status``, such as VmRSS, VmHWM (the peak of VmRSS) or RssAnon.

    Raises:
        OSError: the process is gone, or the kernel tells no such figure.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/{pid}/status has no {field}")


def reset_peak() -> None:
    """Let VmHWM of this process start anew from what is resident now.

    Raises:
        OSError: the kernel does not allow it.
    """
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def tell_allocator(function: str, *arguments: int) -> bool:
    """Call a function of the C allocator; False where it is not glibc's, or refuses."""
    found = getattr(ctypes.CDLL(None), function, None)
    return found is not None and bool(found(*arguments))


def keep_freed_memory() -> bool:
    """Let the C allocator keep what a step frees for the next one, instead of faulting every large tensor in anew.

    A training step on the CPU allocates and frees the same large tensors over and over; with glibc's defaults each
    goes back to the kernel and comes back page by page. The process then stays at its largest size. Returns False
    where the allocator is not glibc's.
    """
    return all(tell_allocator("mallopt", option, _KEEP_BYTES) for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
