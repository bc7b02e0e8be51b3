"""Optimizer states on the host while somebody else uses the GPU: masters and moments, three quarters of the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from spear_megatron.trainer.optimizer import PolicyOptimizer

_HOST = torch.device("cpu")


class StateOffload:
    """Moves the float32 masters and the moments of an optimizer between device and host.

    Weights and gradient buffers stay: forward passes of publications need them. Tensors keep their identity, so that
    whoever refers to them (the optimizer, a checkpoint) finds them in either place. Without a GPU nothing is moved.
    """

    def __init__(self, optimizer: PolicyOptimizer) -> None:
        self._optimizer = optimizer
        self._moved: list[tuple[torch.Tensor, torch.device]] = []

    def to_host(self) -> None:
        """Move to host memory what is on a device, and give the device's memory back."""
        for tensor in states_of(self._optimizer):
            if tensor.device != _HOST:
                self._moved.append((tensor, tensor.device))
                tensor.data = tensor.data.to(_HOST)
        if self._moved and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def to_device(self) -> None:
        """Move everything back to where it was."""
        for tensor, home in self._moved:
            tensor.data = tensor.data.to(home, non_blocking=True)
        self._moved = []
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def states_of(optimizer: PolicyOptimizer) -> Iterator[torch.Tensor]:
    """Masters and moments of all chained optimizers: tensors that share no memory with the model, each once."""
    shared = set(_storages(tensor for chunk in optimizer.chunks for tensor in _buffers(chunk)))
    seen: set[int] = set()
    for part in optimizer.megatron.chained_optimizers:
        inner = part.optimizer
        for tensor in (*(p for group in inner.param_groups for p in group["params"]), *_moments(inner)):
            address = tensor.untyped_storage().data_ptr()
            if id(tensor) not in seen and address not in shared and tensor.dim() > 0:
                seen.add(id(tensor))
                yield tensor


def _moments(inner: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _buffers(chunk: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Everything that the model's own memory consists of."""
    yield from chunk.parameters()
    yield from (buffer for _, buffer in chunk.named_buffers())  # Megatron's wrapper has a list called buffers


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[int]:
    for tensor in tensors:
        yield tensor.untyped_storage().data_ptr()
