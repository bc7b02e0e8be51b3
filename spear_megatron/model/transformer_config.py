"""From a model's shape and Megatron's sizes to megatron-core's TransformerConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from spear_megatron.model.acceleration import Acceleration
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def check_layout(shape: ModelShape, megatron: MegatronConfig) -> None:
    """Refuse a layout that the model cannot be cut into.

    Raises:
        ValueError: layers do not divide over pipeline chunks, or heads, key/value heads, MLP rows or the joint
            query/key/value rows over tensor ranks; names the sizes.
    """
    tp = megatron.tensor_model_parallel_size
    chunks = megatron.pipeline_model_parallel_size * megatron.num_chunks
    if shape.num_layers % chunks:
        raise ValueError(
            f"{shape.num_layers} layers cannot be cut into {chunks} equal pipeline chunks "
            f"(pipeline_model_parallel_size={megatron.pipeline_model_parallel_size} x "
            f"virtual_pipeline_model_parallel_size={megatron.num_chunks}): choose sizes that divide the layers"
        )
    for name in ("num_attention_heads", "intermediate_size"):
        size = getattr(shape, name)
        if size % tp:
            raise ValueError(f"{name} ({size}) must be a multiple of tensor_model_parallel_size ({tp})")
    groups = shape.num_key_value_heads
    if groups % tp and tp % groups:
        raise ValueError(
            f"num_key_value_heads ({groups}) must be a multiple or a divisor of tensor_model_parallel_size ({tp})"
        )
    rows = (shape.num_attention_heads + 2 * groups) * shape.head_dim
    if rows % tp:
        raise ValueError(
            f"the {rows} rows of the joint query/key/value projection must be a multiple of "
            f"tensor_model_parallel_size ({tp})"
        )
    if megatron.sequence_parallel and shape.hidden_size % tp:
        raise ValueError(f"hidden_size ({shape.hidden_size}) must be a multiple of tensor_model_parallel_size ({tp})")


def build_transformer_config(
    shape: ModelShape,
    megatron: MegatronConfig,
    *,
    dtype: torch.dtype,
    acceleration: Acceleration = Acceleration(),
    on_cuda: bool = False,
) -> TransformerConfig:
    """Configuration of the Megatron model.

    Weights are not initialised: they are loaded. Losses are normalised by the caller (``calculate_per_token_loss``),
    so that neither the number of micro-batches nor the data-parallel size scales a gradient.

    Args:
        dtype: torch.float32 or torch.bfloat16, of weights and activations.
        acceleration: which optional kernels (Transformer Engine's layers bring their fused rope).
        on_cuda: the model lives on a CUDA device.

    Raises:
        ValueError: see ``check_layout``; or another dtype.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"weights must be float32 or bfloat16, got {dtype}")
    check_layout(shape, megatron)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=megatron.virtual_pipeline_model_parallel_size,
        context_parallel_size=megatron.context_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        recompute_granularity=megatron.recompute_granularity,
        recompute_method=megatron.recompute_method,
        recompute_num_layers=megatron.recompute_num_layers,
        perform_initialization=False,
        use_cpu_initialization=not on_cuda,
        # the fused forms below are compiled or CUDA kernels
        gradient_accumulation_fusion=acceleration.weight_gradient_fusion,
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=on_cuda,
        masked_softmax_fusion=False,
        apply_rope_fusion=acceleration.transformer_engine,
        persist_layer_norm=False,
        attention_backend=AttnBackend[megatron.attention_backend],
        fp8=megatron.fp8,
        fp8_recipe=megatron.fp8_recipe,
        batch_p2p_comm=on_cuda and not megatron.overlap_p2p_comm,
        overlap_p2p_comm=megatron.overlap_p2p_comm,
        # gloo does not keep what an overlapped message still sends
        deallocate_pipeline_outputs=on_cuda or not megatron.overlap_p2p_comm,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )
