"""Memory of handing the weights to the engines: one full Hugging Face tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from spear_megatron.model.shape import ModelShape
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.meta import RankModel


@dataclass(frozen=True, slots=True)
class SyncBuffers:
    """Gather of the largest tensor that this rank takes part in (``model.hf_io``).

    With E its bytes: every tensor rank packs its part twice, 2 E / TP; the first receives all parts and assembles the
    full tensor, 2 E more. Without tensor parallelism the copy alone, E. The first stage's first rank also receives the
    full tensors of the other stages, E.
    """

    shape: ModelShape
    layout: Layout
    model: RankModel
    itemsize: int
    label: ClassVar[str] = "weight sync"

    @property
    def nbytes(self) -> int:
        shapes = self.shape.parameter_shapes()
        own = max(prod(shapes[name]) for name in self.model.pieces) * self.itemsize
        first = self.model.tp_rank == 0
        tp = self.layout.tp
        gathered = (own if first else 0) if tp == 1 else 2 * own // tp + (2 * own if first else 0)
        if not first or self.model.pp_rank:
            return gathered
        foreign = [prod(size) for name, size in shapes.items() if name not in self.model.pieces]
        return max(gathered, max(foreign, default=0) * self.itemsize)
