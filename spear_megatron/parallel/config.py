"""Sizes and options of Megatron's parallelism."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spear_megatron.parallel.context import context_multiple

_PREFIX = "actor_rollout_ref.actor.megatron"
_RECOMPUTE_GRANULARITIES = (None, "selective", "full")
_RECOMPUTE_METHODS = (None, "uniform", "block")


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """Keys under ``actor_rollout_ref.actor.megatron``.

    The data-parallel size is what remains: world size / (tensor * context * pipeline). ``recompute_*`` trade compute
    for activation memory: ``selective`` recomputes the core attention, ``full`` whole layers (``recompute_method`` and
    ``recompute_num_layers`` say which).
    """

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers, as stages of a pipeline."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank, run interleaved; null for one."""
    context_parallel_size: int = 1
    """Ranks that share every sequence by tokens, for long ones; each is padded to a multiple of twice this."""
    sequence_parallel: bool = False
    """Cut the activations between matrices by tokens over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = True
    """Cut the optimizer states over the data-parallel ranks."""
    recompute_granularity: str | None = None
    """What the backward pass computes again: null nothing, selective the attention, full whole layers."""
    recompute_method: str | None = None
    """Which layers full recomputes: uniform groups of layers, or a block of the first ones."""
    recompute_num_layers: int | None = None
    """Layers per uniform group, or layers of the block."""
    overlap_grad_reduce: bool = False
    """Reduce the gradients in buckets while the backward pass of the last micro-batch goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket while the next forward pass goes on; needs overlap_grad_reduce."""
    ddp_bucket_size: int | None = None
    """Parameters per bucket of these; null takes the larger of 40 million and a million per data-parallel rank."""
    overlap_p2p_comm: bool = False
    """Send between pipeline stages while they compute; needs virtual stages."""
    gradient_accumulation_fusion: bool | Literal["auto"] = "auto"
    """Add weight gradients to the float32 gradient inside their product; auto where Apex's CUDA extension is."""
    attention_backend: Literal["auto", "flash", "fused"] = "auto"
    """Attention of Transformer Engine's layers: the flash-attn package, cuDNN's fused one, or its own choice."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Compute products of Transformer Engine's layers in FP8; hybrid has e5m2 gradients. Weights stay bfloat16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How FP8 values are scaled; doctor tells which ones the device can."""

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_PREFIX}.{name} must be at least 1, got {getattr(self, name)}")
        self._check_pipeline()
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(f"{_PREFIX}.sequence_parallel needs tensor_model_parallel_size > 1; set it to false")
        self._check_recompute()
        self._check_overlap()

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def token_multiple(self) -> int:
        """What the token length of a packed micro-batch is a multiple of.

        Every rank's part of the tokens is cut evenly; FP8 products need multiples of 16 on each (32 for mxfp8).
        """
        cp = self.context_parallel_size
        parts = cp * (self.tensor_model_parallel_size if self.sequence_parallel else 1)
        return math.lcm(context_multiple(cp), parts * self.fp8_multiple)

    @property
    def fp8_multiple(self) -> int:
        """What the sides of a product must be multiples of."""
        return 1 if self.fp8 is None else 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def num_chunks(self) -> int:
        """Model chunks on each pipeline rank."""
        return self.virtual_pipeline_model_parallel_size or 1

    def _check_pipeline(self) -> None:
        virtual = self.virtual_pipeline_model_parallel_size
        if virtual is None:
            return
        if virtual < 2:
            raise ValueError(
                f"{_PREFIX}.virtual_pipeline_model_parallel_size must be null or at least 2, got {virtual}"
            )
        if self.pipeline_model_parallel_size < 2:
            raise ValueError(
                f"{_PREFIX}.virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size > 1; "
                "set it to null"
            )

    def _check_recompute(self) -> None:
        if self.recompute_granularity not in _RECOMPUTE_GRANULARITIES:
            raise ValueError(
                f"{_PREFIX}.recompute_granularity must be null, selective or full, got {self.recompute_granularity!r}"
            )
        if self.recompute_method not in _RECOMPUTE_METHODS:
            raise ValueError(
                f"{_PREFIX}.recompute_method must be null, uniform or block, got {self.recompute_method!r}"
            )
        full = self.recompute_granularity == "full"
        if full and (self.recompute_method is None or self.recompute_num_layers is None):
            raise ValueError(
                f"{_PREFIX}.recompute_granularity=full needs recompute_method and recompute_num_layers to be set"
            )
        if not full and (self.recompute_method is not None or self.recompute_num_layers is not None):
            raise ValueError(
                f"{_PREFIX}.recompute_method and recompute_num_layers apply only to recompute_granularity=full"
            )
        if full and self.recompute_num_layers is not None and self.recompute_num_layers < 1:
            raise ValueError(f"{_PREFIX}.recompute_num_layers must be at least 1, got {self.recompute_num_layers}")

    def _check_overlap(self) -> None:
        needs = {
            "overlap_param_gather": (self.overlap_param_gather, "overlap_grad_reduce", self.overlap_grad_reduce),
            "ddp_bucket_size": (self.ddp_bucket_size is not None, "overlap_grad_reduce", self.overlap_grad_reduce),
            "overlap_p2p_comm": (
                self.overlap_p2p_comm,
                "virtual_pipeline_model_parallel_size",
                self.virtual_pipeline_model_parallel_size is not None,
            ),
            "fp8_recipe": (self.fp8_recipe != "delayed", "fp8", self.fp8 is not None),
        }
        for name, (asked, needed, given) in needs.items():
            if asked and not given:
                raise ValueError(f"{_PREFIX}.{name}={getattr(self, name)} acts only with {needed}: set that too")
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError(f"{_PREFIX}.overlap_param_gather needs use_distributed_optimizer=true")
        if self.ddp_bucket_size is not None and self.ddp_bucket_size < 1:
            raise ValueError(f"{_PREFIX}.ddp_bucket_size must be at least 1, got {self.ddp_bucket_size}")
