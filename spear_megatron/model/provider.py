"""Builds the Megatron model: one GPT chunk per virtual pipeline stage, wrapped for data parallelism."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.model.acceleration import Acceleration, choose_acceleration
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.specs import block_spec
from spear_megatron.model.transformer_config import build_transformer_config
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.state import ParallelState

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

VOCAB_MULTIPLE = 64


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of Megatron's embedding: the next multiple of 64 and of ``tp_size``.

    Every tensor size that divides 64 gives the same number, so that a checkpoint fits into another layout.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, tp_size)
    return -(-vocab_size // multiple) * multiple


def build_model(
    shape: ModelShape,
    megatron: MegatronConfig,
    *,
    dtype: torch.dtype,
    parallel: ParallelState,
    kernels: str = "auto",
    with_ddp: bool = True,
) -> list[MegatronModule]:
    """Model chunks of this rank, in virtual pipeline order (one chunk without virtual stages).

    The weights are not initialised: load them (``hf_io.load_hf_folder`` or a checkpoint) before building the
    optimizer, which copies them. With ``with_ddp`` chunks are Megatron's DistributedDataParallel, whose gradients
    accumulate in float32 and are summed, not averaged, over data-parallel ranks. Logits of a last-stage chunk are
    [1, T, padded_vocab / tp], cut over the tensor ranks; columns from ``shape.vocab_size`` on are padding.

    Args:
        kernels: ``auto`` (Transformer Engine layers when usable) or ``eager`` (the plain layers).

    Raises:
        ValueError: the layout does not fit the model or the process groups.
    """
    wanted = (
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        megatron.virtual_pipeline_model_parallel_size,
        megatron.context_parallel_size,
    )
    made = (parallel.tp_size, parallel.pp_size, parallel.vpp_size, parallel.cp_size)
    if wanted != made:
        raise ValueError(
            f"the process groups were made for (tensor, pipeline, virtual pipeline, context) sizes {made}, the model "
            f"wants {wanted}: initialise them with the same sizes"
        )
    on_cuda = parallel.platform.is_cuda
    acceleration = choose_acceleration(megatron, kernels, parallel.platform, dtype)
    with megatron_on_cpu():
        config = build_transformer_config(
            shape, megatron, dtype=dtype, acceleration=acceleration, on_cuda=on_cuda
        )
        stages = [None] if parallel.vpp_size is None else list(range(parallel.vpp_size))
        chunks = [_build_chunk(shape, config, parallel, stage, acceleration) for stage in stages]
        if with_ddp:
            return _wrap_ddp(chunks, config, megatron)
        return list(chunks)


def _build_chunk(
    shape: ModelShape,
    config: TransformerConfig,
    parallel: ParallelState,
    vp_stage: int | None,
    acceleration: Acceleration,
) -> GPTModel:
    from megatron.core.models.gpt import GPTModel

    last_virtual = None if parallel.vpp_size is None else parallel.vpp_size - 1
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(
            shape, config, use_transformer_engine=acceleration.transformer_engine, vp_stage=vp_stage
        ),
        vocab_size=padded_vocab_size(shape.vocab_size, parallel.tp_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel.is_first_stage and vp_stage in (None, 0),
        post_process=parallel.is_last_stage and vp_stage == last_virtual,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        vp_stage=vp_stage,
    )
    _mark_tensor_parallel(chunk)
    return chunk.to(parallel.platform.device)


def _mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Put the marks on every parameter that Megatron's optimizer reads to count a gradient once in the global norm.

    Megatron's layers set them while they initialise a weight, which loaded weights skip: without a mark a cut
    parameter passes for a replicated one and its gradient counts on the first tensor rank only.
    """
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        set_defaults_if_not_set_tensor_model_parallel_attributes,
        set_tensor_model_parallel_attributes,
    )

    for module in chunk.modules():
        weight = getattr(module, "weight", None)
        if weight is None or getattr(weight, "tensor_model_parallel", False):
            continue
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=1, stride=1)
    for parameter in chunk.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


def _wrap_ddp(
    chunks: list[GPTModel], config: TransformerConfig, megatron: MegatronConfig
) -> list[MegatronModule]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=megatron.use_distributed_optimizer,
        overlap_grad_reduce=megatron.overlap_grad_reduce,
        overlap_param_gather=megatron.overlap_param_gather,
        bucket_size=megatron.ddp_bucket_size,
        check_for_nan_in_grad=False,
        average_in_collective=False,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if megatron.overlap_grad_reduce:
        # The schedules reduce with the last micro-batch: before it, gradients only accumulate.
        waits = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = waits[0] if len(waits) == 1 else waits
    return wrapped
