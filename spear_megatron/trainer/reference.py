"""The reference policy: the initial weights on the host, swapped in for one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Reference:
    """Host copy of this rank's weights as they are now; make it before training and before a checkpoint is restored."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in _parameters(chunks)]

    @contextmanager
    def swapped_in(self, chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """While active, ``chunks`` compute with the reference weights; on exit they hold their own, bit for bit."""
        parameters = _parameters(chunks)
        own = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        try:
            _fill(parameters, self._weights)
            yield
        finally:
            _fill(parameters, own)


def _parameters(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]


@torch.no_grad()
def _fill(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    # In place: Megatron's buffers alias the parameters' memory.
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
