"""What a rank keeps through every phase: weights, gradients, optimizer; each term says its formula and its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from spear_megatron.plan.meta import BufferInfo, RankModel

FP32 = 4


class Term(Protocol):
    """One part of a rank's memory: ``label`` names it in tables and errors, ``nbytes`` is its size."""

    @property
    def label(self) -> str:
        """Name in tables, pictures and errors."""

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Weights: sum of numel * bytes per element.

    With the distributed optimizer they live in the padded buffers that the all-gather after a step fills, one per
    model chunk. Counted from Megatron's own construction (``plan.meta``), not from a formula.
    """

    model: RankModel
    label: ClassVar[str] = "parameters"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        buffers = self.model.buffers
        if buffers and all(buffer.holds_parameters for buffer in buffers):
            return sum(buffer.numel * buffer.param_itemsize for buffer in buffers)
        return sum(info.nbytes for info in self.model.parameters.values())


@dataclass(frozen=True, slots=True)
class MainGradients:
    """Gradients: 4 bytes per element of the padded gradient buffers, whatever the weights' dtype.

    Gradients accumulate in float32 (``grad_reduce_in_fp32``) and are reduced in place, so that the buckets of the data
    parallel communication take no memory beyond them. Source: megatron-core 0.16.1, ``_ParamAndGradBuffer``.
    """

    buffers: Sequence[BufferInfo]
    label: ClassVar[str] = "main gradients"

    @property
    def nbytes(self) -> int:
        return sum(FP32 * buffer.numel for buffer in self.buffers)


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """Adam's two moments, 8 bytes per owned element, and 4 more for the float32 copy of bfloat16 weights.

    With the distributed optimizer a rank owns 1 / DP of every bucket (padding has no state); float32 weights are their
    own main copy. Source: megatron-core 0.16.1, ``DistributedOptimizer``; arXiv 1910.02054, section 3.1.
    """

    buffers: Sequence[BufferInfo]
    label: ClassVar[str] = "optimizer state"

    @property
    def nbytes(self) -> int:
        return sum((8 + (FP32 if buffer.param_itemsize < FP32 else 0)) * buffer.owned for buffer in self.buffers)


@dataclass(frozen=True, slots=True)
class OptimizerWorkspace:
    """Temporaries of one Adam step.

    ``single``: torch's loop over parameters (CPU) makes the denominator of one parameter in two steps, 2 * 4 bytes per
    element of the largest. ``foreach``: torch on CUDA takes the square root of all second moments at once, 4 bytes per
    owned element. ``fused``: Transformer Engine's FusedAdam has none. Source: torch.optim.adam.
    """

    buffers: Sequence[BufferInfo]
    implementation: str
    label: ClassVar[str] = "optimizer workspace"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        if self.implementation == "single":
            return 2 * FP32 * max((buffer.largest_owned for buffer in self.buffers), default=0)
        if self.implementation == "foreach":
            return FP32 * sum(buffer.owned for buffer in self.buffers)
        return 0


@dataclass(frozen=True, slots=True)
class Reserve:
    """What no tensor shows: device context, NCCL channels, workspaces of matrix products, allocator fragmentation.

    ``fixed`` bytes and ``share`` of the activations (the part that is allocated and freed all the time). Both are
    assumptions of the caller, not measurements.
    """

    fixed: int
    share: float
    activations: int
    label: ClassVar[str] = "reserve"

    @property
    def nbytes(self) -> int:
        return self.fixed + int(self.share * self.activations)
