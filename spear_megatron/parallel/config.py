"""Sizes and options of Megatron's parallelism."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_PREFIX}.{name} must be at least 1, got {getattr(self, name)}")
        self._check_pipeline()
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(f"{_PREFIX}.sequence_parallel needs tensor_model_parallel_size > 1; set it to false")
        self._check_recompute()

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

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
