"""Which device and which collective backend this process uses."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEEP_BYTES = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Device of this process and the torch.distributed backend that serves it."""

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def detect_platform(local_rank: int = 0) -> Platform:
    """CUDA device number ``local_rank`` with NCCL when CUDA is available, else the CPU with gloo.

    Raises:
        ValueError: there are CUDA devices, but fewer than ``local_rank + 1``.
    """
    if not torch.cuda.is_available():
        return Platform(device=torch.device("cpu"), backend="gloo")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no CUDA device, {count} visible: start at most {count} processes per host"
        )
    return Platform(device=torch.device("cuda", local_rank), backend="nccl")


def keep_freed_memory() -> bool:
    """Let the C allocator keep what a step frees for the next one, instead of faulting every large tensor in anew.

    A training step on the CPU allocates and frees the same large tensors over and over; with glibc's defaults each
    goes back to the kernel and comes back page by page. The process then stays at its largest size. Returns False
    where the allocator is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(bool(mallopt(option, _KEEP_BYTES)) for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
