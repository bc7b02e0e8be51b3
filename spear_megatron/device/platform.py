"""Which device and which collective backend this process uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
