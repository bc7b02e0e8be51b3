"""What one decoder layer keeps for its backward pass, and how many micro-batches keep it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from spear_megatron.model.shape import ModelShape
from spear_megatron.plan.layout import Layout

FP32 = 4
Spec = Literal["plain", "transformer_engine"]


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Widths of one layer on one tensor rank, per token.

    Attributes:
        hidden: H; queries, keys: columns of the query and of the key projection on this rank; mlp: F / TP.
        heads: of the queries; groups: key/value heads, both on this rank.
        itemsize: bytes of one activation element.
        tokens: T, of one micro-batch on this rank. cut_tokens: T / TP under sequence parallelism, else T.
        all_tokens: of the micro-batch over all context-parallel ranks, whose keys and values the plain layers gather.
        mask_elements: of the masks with which they hide later keys, one per chunk of queries that has earlier keys.
        packed: whether a micro-batch holds several sequences.
        mlp_kept: multiples of F per token that the gated MLP keeps: both halves and the product, 3, and where its
            activation is not fused (on the CPU) the activated gate and the shifted other half too, 5.
    """

    hidden: int
    queries: int
    keys: int
    mlp: int
    heads: int
    groups: int
    head_dim: int
    itemsize: int
    tokens: int
    cut_tokens: int
    all_tokens: int
    mask_elements: int
    packed: bool
    qk_norm: bool
    mlp_kept: int

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        layout: Layout,
        *,
        tokens: int,
        itemsize: int,
        packed: bool,
        fused_mlp: bool,
        sequence_tokens: int = 0,
        cp_rank: int = 0,
    ) -> LayerSizes:
        """Sizes of ``shape`` cut by ``layout`` for micro-batches of ``tokens`` tokens over all context-parallel ranks.

        Args:
            sequence_tokens: of one packed sequence; 0 for a micro-batch of one.
            cp_rank: the rank whose masks are counted.
        """
        tp, own = layout.tp, -(-tokens // layout.cp)
        groups = max(1, shape.num_key_value_heads // tp)
        return cls(
            hidden=shape.hidden_size,
            queries=shape.num_attention_heads * shape.head_dim // tp,
            keys=groups * shape.head_dim,
            mlp=shape.intermediate_size // tp,
            heads=shape.num_attention_heads // tp,
            groups=groups,
            head_dim=shape.head_dim,
            itemsize=itemsize,
            tokens=own,
            cut_tokens=-(-own // tp) if layout.megatron.sequence_parallel else own,
            all_tokens=tokens,
            mask_elements=_mask_elements(tokens, sequence_tokens or tokens, layout.cp, cp_rank),
            packed=packed,
            qk_norm=shape.qk_norm,
            mlp_kept=3 if fused_mlp else 5,
        )

    @property
    def gathered(self) -> bool:
        """Whether keys and values of other ranks are on this one (context parallelism)."""
        return self.all_tokens > self.tokens

    @property
    def hidden_bytes(self) -> int:
        """One hidden state of all tokens that this rank holds."""
        return self.cut_tokens * self.hidden * self.itemsize


def _mask_elements(tokens: int, sequence_tokens: int, cp: int, cp_rank: int) -> int:
    """Queries times visible keys of a rank's two chunks of every sequence, of 2 CP; the first chunk has no mask."""
    if cp == 1:
        return 0
    chunk = sequence_tokens / (2 * cp)
    seen = (cp_rank + 1 if cp_rank else 0) + 2 * cp - cp_rank
    return int(tokens / sequence_tokens * chunk * chunk * seen)


def kept_by_layer(sizes: LayerSizes, spec: Spec, *, selective: bool = False) -> int:
    """Bytes that one layer keeps of one micro-batch for its backward pass.

    Args:
        selective: the core attention is computed again (``recompute_granularity: selective``).
    """
    per_layer = _kept_plain if spec == "plain" else _kept_transformer_engine
    return per_layer(sizes, selective)


def kept_by_norm(sizes: LayerSizes) -> int:
    """Root mean square norm of the hidden state in the plain spec.

    float32: input, normalised input, output and one factor per token, 12 H + 4. bfloat16: the input in float32,
    normalised input and output, 8 H + 4.
    """
    wide = 3 * FP32 if sizes.itemsize == FP32 else FP32 + 2 * sizes.itemsize
    return sizes.cut_tokens * (wide * sizes.hidden + FP32)


def _kept_plain(sizes: LayerSizes, selective: bool) -> int:
    """Megatron's linears with our norm and torch's attention, as autograd saves tensors; checked by measurement.

    Two norms; the joint projection (the values are a view of it); normed queries and keys; four tables of the rotary
    embedding; rotated queries and keys, output and log-sum-exp of the attention; the joined output where a micro-batch
    has several sequences; and 5 F (3 F) of the gated MLP. Under context parallelism, keys and values of all ranks
    instead of the rank's own, and a mask for every chunk of queries behind the first. On CUDA torch's norms keep less:
    there it is an upper bound.
    """
    b = sizes.itemsize
    per_token = (sizes.queries + 2 * sizes.keys) * b + 4 * sizes.head_dim * b
    if sizes.qk_norm:
        copied = sizes.groups > 1 or b < FP32  # a single group's queries are a view of the joint projection
        per_token += FP32 * sizes.queries * copied + b * sizes.queries + FP32 * sizes.heads
        per_token += FP32 * sizes.keys * (b < FP32) + b * sizes.keys + FP32 * sizes.groups
    keys = 0 if sizes.gathered else sizes.keys
    per_token += (2 * sizes.queries + keys) * b
    if not selective:
        per_token += FP32 * sizes.heads + sizes.queries * b * (sizes.packed or sizes.gathered)
    per_token += sizes.mlp_kept * sizes.mlp * b
    gathered = gathered_bytes(sizes) + MASK_COPIES * sizes.mask_elements * b if not selective else 0
    return 2 * kept_by_norm(sizes) + sizes.tokens * per_token + gathered


MASK_COPIES = 1
"""What torch keeps of a boolean mask: one of the queries' dtype, to be added to the scores."""


def gathered_bytes(sizes: LayerSizes) -> int:
    """Keys and values of all context-parallel ranks, in the order of the sequence; 0 without."""
    return 2 * sizes.keys * sizes.all_tokens * sizes.itemsize * sizes.gathered


def _kept_transformer_engine(sizes: LayerSizes, selective: bool) -> int:
    """Transformer Engine's fused layers, flash attention and a fused SwiGLU (after arXiv 2205.05198, section 4.1).

    Per norm its input and output, 2 H, and a float32 factor; queries, keys and values of the attention, its output and
    log-sum-exp; with head norms their inputs as well; 2 F before and F after the activation. Its ring attention keeps
    keys and values of its own tokens alone. Not measured here.
    """
    b = sizes.itemsize
    norms = 2 * sizes.cut_tokens * (2 * sizes.hidden * b + FP32)
    per_token = (2 * sizes.queries + 2 * sizes.keys) * b + 3 * sizes.mlp * b
    if sizes.qk_norm:
        per_token += (sizes.queries + sizes.keys) * b + FP32 * (sizes.heads + sizes.groups)
    if not selective:
        per_token += FP32 * sizes.heads
    return norms + sizes.tokens * per_token


def in_flight(layout: Layout, stage: int, num_micro_batches: int) -> int:
    """Forward passes of one model chunk whose backward pass is still to come, at most, on a pipeline stage.

    Without interleaving (1F1B, arXiv 2104.04473, section 2.2.1) min(PP - stage, m) micro-batches of the stage's only
    chunk. Interleaved (section 2.2.2) 2 (PP - stage - 1) + (VPP - 1) PP + 1 passes, each of one of VPP chunks, at most
    m VPP. A single stage has one.
    """
    if layout.pp == 1:
        return 1
    chunks = layout.megatron.num_chunks
    if chunks == 1:
        return min(layout.pp - stage, num_micro_batches)
    warm_up = 2 * (layout.pp - stage - 1) + (chunks - 1) * layout.pp
    return min(warm_up + 1, num_micro_batches * chunks)


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Activations that wait for their backward pass at the peak of an update.

    Passes in flight times the layers of a chunk times what one keeps (``kept_by_layer``). Full recomputation keeps the
    input of every group of layers instead: H per token and group with ``uniform``; with ``block`` of the first layers,
    the others in full.
    """

    sizes: LayerSizes
    layout: Layout
    spec: Spec
    stage: int
    layers_per_chunk: int
    num_micro_batches: int

    label: ClassVar[str] = "activations"

    @property
    def passes(self) -> int:
        """Forward passes of one chunk in flight."""
        return in_flight(self.layout, self.stage, self.num_micro_batches)

    @property
    def of_layer(self) -> int:
        """Bytes that one layer keeps when nothing but, maybe, its attention is computed again."""
        selective = self.layout.megatron.recompute_granularity == "selective"
        return kept_by_layer(self.sizes, self.spec, selective=selective)

    @property
    def group(self) -> int:
        """Layers that full recomputation computes again at once; 0 without."""
        megatron = self.layout.megatron
        if megatron.recompute_granularity != "full":
            return 0
        count = min(megatron.recompute_num_layers or 1, self.layers_per_chunk)
        return count if megatron.recompute_method == "uniform" else min(1, count)

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        layers, megatron = self.layers_per_chunk, self.layout.megatron
        if not self.group:
            return self.passes * (layers * self.of_layer + self._received)
        if megatron.recompute_method == "uniform":
            return self.passes * -(-layers // self.group) * self.sizes.hidden_bytes
        count = min(megatron.recompute_num_layers or 1, layers)
        return self.passes * (count * self.sizes.hidden_bytes + (layers - count) * self.of_layer)

    @property
    def _received(self) -> int:
        """Stage inputs in bfloat16: the plain norm keeps them in float32, so that the received tensor is one more."""
        separate = self.spec == "plain" and self.sizes.itemsize < FP32 and self.stage > 0
        return self.sizes.hidden_bytes * separate


@dataclass(frozen=True, slots=True)
class RecomputedLayers:
    """Everything that the group of layers being computed again keeps for its own backward pass (full recomputation)."""

    activations: LayerActivations

    label: ClassVar[str] = "recomputed layers"

    @property
    def nbytes(self) -> int:
        return self.activations.group * self.activations.of_layer
