"""What torch.distributed is started with on a CUDA device, recorded by stand-ins."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spear_megatron.device.platform import Platform
from spear_megatron.parallel import state


def test_nccl_starts_on_its_device_without_binding_later_groups_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound to a device, torch splits every group off the world's communicator on ranks outside of it: gloo members
    make no such split, so that the others would wait for ever."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append((backend, options)))
    device = torch.device("cuda", 3)
    state._start_distributed(1, Platform(device=device, backend="nccl"), timedelta(seconds=5))
    assert [call[0] for call in calls] == ["device", "nccl"] and calls[0][1] == device
    assert set(calls[1][1]) == {"store", "rank", "world_size", "timeout"}
