"""Trainer -> engine: every rank takes part in the gather, the data-parallel leader's engine takes the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from spear_megatron.rollout.engine import Engine


def publish(named_tensors: Iterable[tuple[str, torch.Tensor | None]], engine: Engine | None, version: int) -> None:
    """Hand full Hugging Face tensors to this rank's engine, one at a time, without touching disk.

    Args:
        named_tensors: a collective generator (``model.weight_map.iter_hf_tensors``); non-leaders receive None tensors.
        engine: the leader's engine, or None on ranks without one.
        version: policy version that tokens sampled from now on carry.

    Raises:
        ValueError: the engine refused the weights; the generator is exhausted first, so no peer of the gather waits.
    """
    stream = iter(named_tensors)
    try:
        if engine is not None:
            engine.update_weights(_present(stream), version)
    finally:
        for _ in stream:
            pass


def _present(stream: Iterator[tuple[str, torch.Tensor | None]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream:
        if tensor is not None:
            yield name, tensor
