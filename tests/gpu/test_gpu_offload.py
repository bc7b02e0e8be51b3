"""Optimizer states on the host and back on a real device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from spear_megatron.trainer.offload import StateOffload


def test_states_leave_the_device_and_come_back_as_they_were(device: torch.device) -> None:
    model = torch.nn.Linear(256, 256, device=device, dtype=torch.bfloat16)
    masters = [parameter.detach().float().clone() for parameter in model.parameters()]
    inner = torch.optim.AdamW(masters)
    for master in masters:
        master.grad = torch.ones_like(master)
    inner.step()
    part = SimpleNamespace(optimizer=inner)
    optimizer: Any = SimpleNamespace(chunks=[model], megatron=SimpleNamespace(chained_optimizers=[part]))
    moments = [value for state in inner.state.values() for value in state.values() if value.dim()]
    tensors = [*masters, *moments]
    before = [tensor.clone() for tensor in tensors]
    used = torch.cuda.memory_allocated(device)
    offload = StateOffload(optimizer)
    offload.to_host()
    offload.to_host()
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    assert used - torch.cuda.memory_allocated(device) >= sum(tensor.nbytes for tensor in tensors)
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())
    offload.to_device()
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    assert all(tensor.device.type == "cuda" for tensor in tensors)
    inner.step()
