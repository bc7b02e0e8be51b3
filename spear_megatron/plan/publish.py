"""Memory of moving the weights out: to the engines one full tensor at a time, and to a checkpoint."""

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
        """Bytes, by the formula of the class."""
        shapes = self.shape.parameter_shapes()
        own = max(prod(shapes[name]) for name in self._gathered) * self.itemsize
        first = self.model.tp_rank == 0
        tp = self.layout.tp
        gathered = (own if first else 0) if tp == 1 else 2 * own // tp + (2 * own if first else 0)
        if not first or self.model.pp_rank:
            return gathered
        foreign = [prod(size) for name, size in shapes.items() if name not in self.model.pieces]
        return max(gathered, max(foreign, default=0) * self.itemsize)

    @property
    def _gathered(self) -> list[str]:
        """Tensors that this stage gives: a tied embedding comes from the first stage."""
        tied = self.shape.tie_word_embeddings and self.model.pp_rank > 0
        return [name for name in self.model.pieces if not (tied and name == "model.embed_tokens.weight")]


@dataclass(frozen=True, slots=True)
class SaveStaging:
    """Host memory of gathering the optimizer for a checkpoint that loads at any layout (``fully_reshardable``).

    With the distributed optimizer every rank with the same weights lays out its shards, 12 / (DP CP) bytes per element
    of a bucket; rank 0 receives them (float32 weights and two moments), 12 bytes per element of the buffers so far and
    12 of the bucket on its way; what the previous bucket left is freed late. Then come the cut pieces, as large as all,
    and the weights where they live on the host. Without it rank 0 copies the halves of every gated MLP's first matrix.
    Source: megatron-core 0.16.1, ``get_parameter_state_dp_zero``.
    """

    model: RankModel
    layout: Layout
    on_host: bool = True
    label: ClassVar[str] = "checkpoint staging"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        buffers = self.model.buffers
        if not self.layout.megatron.use_distributed_optimizer:
            return 0 if self.model.shard_rank else self._halves
        first, dp = self.model.shard_rank == 0, self.layout.shards
        peak = gathered = before = 0
        for buffer in buffers:
            gathered += 12 * buffer.numel * first
            for numel in buffer.buckets:
                left = 12 * before // dp + 8 * before * first
                peak = max(peak, gathered + 12 * numel // dp + max(left, 12 * numel * first))
                before = numel
        weights = sum(info.nbytes for info in self.model.parameters.values()) if self.on_host else 0
        return max(peak, 2 * gathered + weights) if first else peak

    @property
    def _halves(self) -> int:
        return sum(
            info.numel * (12 + info.dtype.itemsize)
            for name, info in self.model.parameters.items()
            if name.endswith("linear_fc1.weight") and self.on_host
        )
