"""The memory of one rank in every phase of a training step, as a list of terms per phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from spear_megatron.model.provider import padded_vocab_size
from spear_megatron.model.shape import ModelShape
from spear_megatron.plan.activations import LayerActivations, LayerSizes, RecomputedLayers
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.meta import RankModel
from spear_megatron.plan.publish import SaveStaging, SyncBuffers
from spear_megatron.plan.terms import MainGradients, OptimizerState, OptimizerWorkspace, Parameters, Term
from spear_megatron.plan.workload import Workload
from spear_megatron.plan.workspace import (
    Batch,
    Communication,
    GradientReduction,
    Head,
    HeadBackward,
    HeadForward,
    HeadKept,
    LayerBackward,
    LayerForward,
    WeightGathering,
)

PHASES = ("rollout", "old_log_prob", "ref", "update", "step", "publish", "save")


@dataclass(frozen=True, slots=True)
class EmbeddingBackward:
    """Dense gradient of the first stage's embedding, (V / TP) H in the weights' dtype, at the end of a backward."""

    columns: int
    hidden: int
    itemsize: int
    label: ClassVar[str] = "backward workspace"

    @property
    def nbytes(self) -> int:
        return self.columns * self.hidden * self.itemsize


@dataclass(frozen=True, slots=True)
class Fewer:
    """A term after ``gone`` of its ``count`` equal parts were freed."""

    term: Term
    gone: int
    count: int

    @property
    def label(self) -> str:
        return self.term.label

    @property
    def nbytes(self) -> int:
        return self.term.nbytes * (self.count - self.gone) // self.count


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Terms of every phase on one rank; ``model`` is the rank as Megatron builds it, with its buffers."""

    shape: ModelShape
    layout: Layout
    model: RankModel
    workload: Workload

    @property
    def is_last(self) -> bool:
        return self.model.pp_rank == self.layout.pp - 1

    @property
    def sizes(self) -> LayerSizes:
        work = self.workload
        return LayerSizes.of(
            self.shape,
            self.layout,
            tokens=work.tokens,
            itemsize=work.dtype.itemsize,
            packed=work.packed,
            fused_mlp=not work.on_host,
            sequence_tokens=work.sequence_tokens,
            cp_rank=self.model.cp_rank,
        )

    @property
    def batch_tokens(self) -> float:
        """Tokens of a micro-batch on the device: this rank's, and on the host those that they are taken from too."""
        work, cp = self.workload, self.layout.cp
        return work.tokens / cp + (work.tokens if work.on_host and cp > 1 else 0)

    @property
    def static(self) -> list[Term]:
        """Weights, gradients and optimizer: there in every phase."""
        buffers = self.model.buffers
        return [Parameters(self.model), MainGradients(buffers), OptimizerState(buffers)]

    def phases(self, *, process: bool = False) -> dict[str, list[Term]]:
        """Terms by phase, at its peak; a phase that the run does not have is left out.

        Args:
            process: on the CPU, count what operations allocate inside of themselves too, as a process shows it.
        """
        work = self.workload
        stepping: list[Term] = [OptimizerWorkspace(self.model.buffers, work.optimizer)]
        if process and work.on_host and self.layout.megatron.use_distributed_optimizer:
            stepping.append(WeightGathering(self.model.buffers))
        found: dict[str, list[Term]] = {"rollout": self.static}
        if work.old_log_prob:
            found["old_log_prob"] = self.forward()
        if work.reference:
            found["ref"] = self.forward()
        found["update"] = self.update()
        found["step"] = [*self.static, max(stepping, key=lambda term: term.nbytes)]
        found["publish"] = [*self.static, SyncBuffers(self.shape, self.layout, self.model, work.dtype.itemsize)]
        found["save"] = [*self.static, *([SaveStaging(self.model, self.layout)] if work.on_host else [])]
        return found

    def forward(self) -> list[Term]:
        """A pass without gradients over the whole step's rows."""
        work, sizes = self.workload, self.sizes
        working: list[Term] = [LayerForward(sizes)]
        if self.is_last:
            working.append(HeadForward(self.head))
        return [
            *self.static,
            Batch(self.batch_tokens, work.forward_micro_batches),
            Communication(sizes, self.layout.pp > 1),
            max(working, key=lambda term: term.nbytes),
        ]

    def update(self) -> list[Term]:
        """Forward and backward of one optimizer step, where its peak is: before the first backward pass frees anything
        (head, or a layer), at the end of one (embedding), or when gradients are reduced on the CPU.
        """
        work, sizes = self.workload, self.sizes
        layers = self.activations
        peaks: list[list[Term]] = [[layers, RecomputedLayers(layers), LayerBackward(sizes)]]
        if self.is_last:
            peaks.append([layers, HeadKept(self.head), HeadBackward(self.head)])
        if self.model.pp_rank == 0:
            rows = padded_vocab_size(self.shape.vocab_size, self.layout.tp) // self.layout.tp
            embedding = EmbeddingBackward(rows, sizes.hidden, sizes.itemsize)
            peaks.append([Fewer(layers, 1, layers.passes), embedding])
        if work.on_host and self.layout.megatron.use_distributed_optimizer:
            peaks.append([GradientReduction(self.model.buffers)])
        return [
            *self.static,
            Batch(self.batch_tokens, work.micro_batches),
            Communication(sizes, self.layout.pp > 1),
            *max(peaks, key=total),
        ]

    @property
    def activations(self) -> LayerActivations:
        return LayerActivations(
            sizes=self.sizes,
            layout=self.layout,
            spec=self.workload.spec,
            stage=self.model.pp_rank,
            layers_per_chunk=self.model.layers[0],
            num_micro_batches=self.workload.micro_batches,
        )

    @property
    def head(self) -> Head:
        work, tp = self.workload, self.layout.tp
        return Head(
            sizes=self.sizes,
            rows=work.head_rows,
            columns=padded_vocab_size(self.shape.vocab_size, tp) // tp,
            max_logits_bytes=work.max_logits_bytes,
            eager=work.eager_head,
        )


def total(terms: Sequence[Term]) -> int:
    """Sum of bytes."""
    return sum(term.nbytes for term in terms)
