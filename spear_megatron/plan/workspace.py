"""Memory that lives only while something is computed: the head, one layer's backward or forward pass, batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spear_megatron.plan.activations import FP32, LayerSizes, gathered_bytes, kept_by_norm
from spear_megatron.plan.meta import BufferInfo

BATCH_BYTES_PER_TOKEN = 4 * 8 + 3 * 1 + 6 * 4
"""A packed micro-batch (``types.MicroBatch``): four int64, three bool and six float32 values per token."""
LOSS_VECTORS = 16
"""float32 values per token that the policy loss keeps or makes beside the log-probs, about."""
_CHUNK_ELEMENTS = 1 << 26
_MIN_SLICE_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class Batch:
    """All micro-batches of one optimizer step on the device: tokens * count * 59 bytes."""

    tokens: float
    num_micro_batches: int
    label: ClassVar[str] = "batch"

    @property
    def nbytes(self) -> int:
        return int(self.tokens * self.num_micro_batches * BATCH_BYTES_PER_TOKEN)


@dataclass(frozen=True, kw_only=True)
class Head:
    """LM head and log-probs of the last stage (``kernels.linear_logprobs``).

    Attributes:
        rows: sampled tokens of a micro-batch, the only ones whose logits are computed.
        columns: vocabulary columns of this tensor rank.
        max_logits_bytes: ``actor.max_logits_mb``; more logits than that are computed in slices, twice.
        eager: plain torch statistics, which cast pieces of at most 2^26 logits to float32.
    """

    sizes: LayerSizes
    rows: int
    columns: int
    max_logits_bytes: int
    eager: bool

    @property
    def keeps_logits(self) -> bool:
        """Whether the logits survive until the backward pass."""
        return self.rows * self.columns * self.sizes.itemsize <= self.max_logits_bytes

    @property
    def logits(self) -> int:
        """Bytes of the logits that exist at once: all of them or one slice, at least 256 columns wide."""
        per_column = self.rows * self.sizes.itemsize
        if self.keeps_logits:
            return per_column * self.columns
        columns = max(self.max_logits_bytes // max(per_column, 1), _MIN_SLICE_COLUMNS)
        return per_column * min(columns, self.columns)

    @property
    def temporaries(self) -> int:
        """float32 pieces of the eager statistics: maximum, exponentials and product, three at once."""
        return 3 * FP32 * min(_CHUNK_ELEMENTS, self.rows * self.columns) if self.eager else 0


@dataclass(frozen=True, slots=True)
class HeadForward:
    """Forward only: the sampled rows' hidden states, their logits (all or one slice), statistics."""

    head: Head
    label: ClassVar[str] = "log-prob workspace"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        sizes = self.head.sizes
        inputs = 2 * sizes.hidden_bytes + self.head.rows * sizes.hidden * sizes.itemsize
        return inputs + self.head.logits + self.head.temporaries + LOSS_VECTORS * FP32 * sizes.tokens


@dataclass(frozen=True, slots=True)
class HeadKept:
    """What waits for the backward pass of the head: final norm, selected rows, logits if kept, the loss's vectors."""

    head: Head
    label: ClassVar[str] = "log-prob workspace"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        sizes = self.head.sizes
        inputs = kept_by_norm(sizes) + self.head.rows * sizes.hidden * sizes.itemsize
        logits = self.head.logits if self.head.keeps_logits else 0
        return inputs + logits + LOSS_VECTORS * FP32 * sizes.tokens


@dataclass(frozen=True, slots=True)
class HeadBackward:
    """Backward pass of the head: gradient of the selected rows, and of the weight (V / TP) H in the weights' dtype.

    The weight's gradient itself goes into ``main_grad``; what is allocated stands in for it, so that Megatron's hook
    fires. Sliced logits add one slice, and the rows' gradient in float32.
    """

    head: Head
    label: ClassVar[str] = "backward workspace"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        head, sizes = self.head, self.head.sizes
        stand_in = head.columns * sizes.hidden * sizes.itemsize
        inputs = head.rows * sizes.hidden
        if head.keeps_logits:
            return inputs * sizes.itemsize + stand_in + head.temporaries
        return inputs * (FP32 + sizes.itemsize) + stand_in + head.logits + head.temporaries


@dataclass(frozen=True, slots=True)
class LayerBackward:
    """Largest live set of one layer's backward pass beyond what it keeps, at one of three places of the MLP.

    The gradient of the hidden state (twice, gathered, under sequence parallelism) and, at the second linear: gradients
    of its input (T F) and weight (F H); at the product: 2 T F; at the first linear, when what the MLP kept is freed:
    2 T F + T H and the weight's 2 F H (F over TP). Under context parallelism also the attention's, when what the MLP
    and a norm kept is freed: gradients of the gathered keys and values, in two orders, and of the queries.
    """

    sizes: LayerSizes
    label: ClassVar[str] = "backward workspace"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        s, b = self.sizes, self.sizes.itemsize
        incoming = s.hidden_bytes + (s.tokens * s.hidden * b if s.cut_tokens < s.tokens else 0)
        freed = s.mlp_kept
        second = b * s.mlp * (s.tokens + s.hidden)
        product = b * 2 * s.tokens * s.mlp
        first = b * ((2 - freed) * s.tokens * s.mlp + s.tokens * s.hidden + 2 * s.mlp * s.hidden)
        attention = 0
        if s.gathered:
            attention = 2 * gathered_bytes(s) + 2 * b * s.tokens * s.queries - freed * b * s.tokens * s.mlp
            attention -= kept_by_norm(s)
        return incoming + max(second, product, first, attention)


@dataclass(frozen=True, slots=True)
class LayerForward:
    """Largest live set of one layer's forward pass without gradients.

    Three hidden states (input, attended, normed) and the larger of the MLP (5 F per token, 3 F fused) and
    the attention (joint projection, queries and keys before and after rotation, three temporaries of it).
    """

    sizes: LayerSizes
    label: ClassVar[str] = "forward workspace"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        s, b = self.sizes, self.sizes.itemsize
        mlp = s.mlp_kept * s.mlp
        attention = b * s.tokens * (5 * s.queries + 4 * s.keys) + 2 * gathered_bytes(s) + s.mask_elements * b
        rotary = FP32 * s.head_dim * s.tokens
        return 3 * s.hidden_bytes + max(b * s.tokens * mlp, attention) + rotary


@dataclass(frozen=True, slots=True)
class Communication:
    """Buffers of collectives beside the gradients: Megatron's gathered input under sequence parallelism (T H, kept for
    good) and two tensors of the hidden state on their way between pipeline stages.
    """

    sizes: LayerSizes
    pipeline: bool
    label: ClassVar[str] = "communication"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        s = self.sizes
        gathered = s.tokens * s.hidden * s.itemsize if s.cut_tokens < s.tokens else 0
        return gathered + 2 * s.hidden_bytes * self.pipeline


@dataclass(frozen=True, slots=True)
class GradientReduction:
    """Copy of the largest gradient buffer that gloo makes to reduce and scatter it, 4 bytes per element.

    At the end of an update, when activations are gone. NCCL reduces in place, and so does an all-reduce.
    """

    buffers: tuple[BufferInfo, ...]
    label: ClassVar[str] = "backward workspace"

    @property
    def nbytes(self) -> int:
        return FP32 * max(buffer.numel for buffer in self.buffers)


@dataclass(frozen=True, slots=True)
class WeightGathering:
    """Copy of the largest parameter buffer that gloo makes inside of its all-gather, after an optimizer step.

    No tensor shows it: it counts for the memory of a process on the CPU only. NCCL gathers in place.
    """

    buffers: tuple[BufferInfo, ...]
    label: ClassVar[str] = "optimizer workspace"

    @property
    def nbytes(self) -> int:
        return max(buffer.numel * buffer.param_itemsize for buffer in self.buffers)
