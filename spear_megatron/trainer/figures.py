"""Figures of one step that add up, or are maximised, over micro-batches and data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState


@dataclass(frozen=True, slots=True)
class Figures:
    """Detached scalars (float64) by name: ``sums`` add up, of ``maxima`` the largest counts."""

    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Figures of a whole optimizer step as numbers, equal on every rank."""

    sums: dict[str, float]
    maxima: dict[str, float]

    def mean(self, name: str) -> float:
        """Sum of ``name`` per sampled token, 0 without tokens."""
        return self.sums[name] / max(self.sums["tokens"], 1.0)


def reduce_figures(parts: Sequence[Figures], parallel: ParallelState) -> StepFigures:
    """Combine all micro-batches of all data-parallel ranks; collective over every rank.

    ``parts`` come from the last pipeline stage; its tensor-parallel copies count once. Sums run in rank order, so every
    rank gets the same bits.
    """
    own: tuple[dict[str, float], dict[str, float]] = ({}, {})
    if parallel.is_last_stage and parallel.tp_rank == 0:
        own = _merge([(_numbers(part.sums), _numbers(part.maxima)) for part in parts])
    return StepFigures(*_merge(gather_objects(parallel, own)))


def _numbers(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _merge(parts: Sequence[tuple[dict[str, float], dict[str, float]]]) -> tuple[dict[str, float], dict[str, float]]:
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for part_sums, part_maxima in parts:
        for name, value in part_sums.items():
            sums[name] = sums.get(name, 0.0) + value
        for name, value in part_maxima.items():
            # A NaN must survive the maximum.
            known = maxima.get(name, value)
            maxima[name] = value if value != value or value > known else known
    return sums, maxima
