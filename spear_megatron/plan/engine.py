"""Memory of the rollout engines on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spear_megatron.model.shape import ModelShape

BF16 = 2


@dataclass(frozen=True, slots=True)
class EngineWeights:
    """Weights of one engine on one of its GPUs, in bfloat16: 2 N / TP of the engine."""

    shape: ModelShape
    engine_tp: int
    label: ClassVar[str] = "engine weights"

    @property
    def nbytes(self) -> int:
        return BF16 * self.shape.num_parameters() // self.engine_tp


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of ``tokens`` cached tokens: 2 layers * kv heads * head_dim * 2 bytes each, over the engine's TP.

    Key/value heads are not cut below one per GPU.
    """

    shape: ModelShape
    engine_tp: int
    tokens: int
    label: ClassVar[str] = "KV cache"

    @property
    def nbytes(self) -> int:
        return self.tokens * kv_bytes_per_token(self.shape, self.engine_tp)


def kv_bytes_per_token(shape: ModelShape, engine_tp: int, itemsize: int = BF16) -> int:
    """Bytes that one cached token takes on one GPU of an engine."""
    heads = max(1, shape.num_key_value_heads // engine_tp)
    return 2 * shape.num_layers * heads * shape.head_dim * itemsize


def cache_that_fits(shape: ModelShape, engine_tp: int, free: int, wanted_tokens: int) -> KVCache:
    """Cache of the wanted tokens, or of as many as fit into ``free`` bytes."""
    fitting = max(0, free) // kv_bytes_per_token(shape, engine_tp)
    return KVCache(shape, engine_tp, min(wanted_tokens, fitting))
