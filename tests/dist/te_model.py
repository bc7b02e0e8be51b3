"""A GPTModel by megatron-core's own Transformer Engine layer spec, on stand-ins for Transformer Engine's modules.

The spec function is the real one; only the classes it asks for are replaced. They have the parameters, the checkpoint
keys and the ``_extra_state`` of those of Transformer Engine, and cannot compute.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.model.layers import RMSNorm, SDPAttention
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.transformer_config import build_transformer_config
from spear_megatron.parallel.config import MegatronConfig

SCALING_STATE = torch.arange(5, dtype=torch.uint8)


class _WithState:
    """Saves a byte tensor, as Transformer Engine 2 does with its scaling factors."""

    def get_extra_state(self) -> torch.Tensor:
        return SCALING_STATE.clone()

    def set_extra_state(self, state: Any) -> None:
        assert state is None or torch.equal(state, SCALING_STATE)


class _ColumnParallel(_WithState, ColumnParallelLinear):
    pass


class _RowParallel(_WithState, RowParallelLinear):
    pass


class _LayerNormColumnParallel(_WithState, ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))


class _Norm(_WithState, RMSNorm):
    pass


class _Attention(_WithState, SDPAttention):
    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(self.state_dict(), prefix, {}, sharded_offsets)


class _Provider(gpt_layer_specs.BackendSpecProvider):
    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return _LayerNormColumnParallel

    def column_parallel_linear(self) -> type:
        return _ColumnParallel

    def row_parallel_linear(self) -> type:
        return _RowParallel

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return _Norm

    def core_attention(self) -> type:
        return _Attention

    def activation_func(self) -> None:
        return None

    def linear(self) -> None:
        return None

    def grouped_mlp_modules(self, *args: Any) -> None:
        return None


def build_te_model(shape: ModelShape, vocab_rows: int, dtype: torch.dtype = torch.float32) -> GPTModel:
    """The whole model on this rank, weights not loaded; ``vocab_rows`` as the script's own padding makes them."""
    with megatron_on_cpu(), mock.patch.object(gpt_layer_specs, "TESpecProvider", _Provider, create=True):
        config = build_transformer_config(shape, MegatronConfig(), dtype=dtype)
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
        return GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules([layer] * shape.num_layers, layer_norm=_Norm),
            vocab_size=vocab_rows,
            max_sequence_length=shape.max_position_embeddings,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
        )
