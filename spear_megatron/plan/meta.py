"""What one rank of any layout holds, from Megatron's own construction on the meta device, in a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from spear_megatron.device.cpu_shim import megatron_without_storage
from spear_megatron.device.platform import Platform
from spear_megatron.model.provider import build_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.weight_map import Piece, local_pieces, unwrap
from spear_megatron.parallel.state import ParallelState
from spear_megatron.plan.layout import Layout


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """Shape and dtype of one parameter on one rank."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BufferInfo:
    """One gradient buffer of Megatron's data parallelism, padding included.

    Attributes:
        numel: elements of the buffer; the gradient (float32) and, with the distributed optimizer, the parameters lie
            in buffers of this size.
        buckets: elements of its buckets; a shared embedding has one of its own.
        owned: elements of real parameters whose optimizer state this rank keeps.
        largest_owned: elements of the largest single piece among them.
        param_itemsize: bytes of one parameter element.
        holds_parameters: whether parameters live in a buffer of their own, padded like the gradients.
    """

    numel: int
    buckets: tuple[int, ...]
    owned: int
    largest_owned: int
    param_itemsize: int
    holds_parameters: bool


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """The model of one rank, as Megatron built it.

    Attributes:
        shard_rank: among the ranks with the same weights (``Layout.shards``).
        parameters: by ``<chunk>.<Megatron name>``.
        pieces: Hugging Face name -> what this rank holds of it (``model.weight_map``).
        buffers: gradient buffers; empty unless asked for.
        layers: decoder layers of every chunk.
    """

    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    shard_rank: int
    parameters: dict[str, ParameterInfo]
    pieces: dict[str, list[Piece]]
    buffers: tuple[BufferInfo, ...]
    layers: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return sum(info.numel for info in self.parameters.values())


def build_rank(
    shape: ModelShape, layout: Layout, rank: int, *, dtype: torch.dtype = torch.bfloat16, with_buffers: bool = False
) -> RankModel:
    """Build the model chunks of ``rank`` on the meta device and describe them.

    Args:
        with_buffers: also wrap them for data parallelism, which lays out the gradient buffers.

    Raises:
        ValueError: the layout does not fit the model, the rank is none of its ranks, or this process already belongs
            to a process group.
    """
    with standing_in(layout, rank) as parallel:
        chunks = build_model(
            shape, layout.megatron, dtype=dtype, parallel=parallel, kernels="eager", with_ddp=with_buffers
        )
        parameters = {
            f"{index}.{name}": ParameterInfo(tuple(parameter.shape), parameter.dtype)
            for index, chunk in enumerate(chunks)
            for name, parameter in unwrap(chunk).named_parameters()
        }
        return RankModel(
            tp_rank=parallel.tp_rank,
            pp_rank=parallel.pp_rank,
            dp_rank=parallel.dp_rank,
            cp_rank=parallel.cp_rank,
            shard_rank=_shard_rank(layout, parallel.cp_rank, parallel.dp_rank),
            parameters=parameters,
            pieces=local_pieces(chunks, shape, layout.tp),
            buffers=tuple(_buffers(chunks, layout, _shard_rank(layout, parallel.cp_rank, parallel.dp_rank)))
            if with_buffers
            else (),
            layers=tuple(len(unwrap(chunk).decoder.layers) for chunk in chunks),
        )


@contextmanager
def standing_in(layout: Layout, rank: int) -> Iterator[ParallelState]:
    """Megatron's groups as ``rank`` of the layout sees them, on torch's ``fake`` backend, and no memory for tensors.

    The backend moves nothing: collectives return at once. Groups and contexts are gone afterwards.

    Raises:
        ValueError: the rank is none of the layout's, or torch.distributed is in use.
    """
    from megatron.core import parallel_state as mpu

    if not 0 <= rank < layout.world_size:
        raise ValueError(f"rank={rank} is not one of the {layout.world_size} ranks of the layout")
    if dist.is_initialized():
        raise ValueError("torch.distributed is already initialised: plan layouts before starting the process groups")
    with megatron_without_storage():
        _start(layout, rank)
        try:
            yield _state(layout, rank)
        finally:
            mpu.destroy_model_parallel()
            dist.destroy_process_group()


def _start(layout: Layout, rank: int) -> None:
    from megatron.core import parallel_state as mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        create_gloo_process_groups=False,
    )


def _state(layout: Layout, rank: int) -> ParallelState:
    from megatron.core import parallel_state as mpu

    world = dist.distributed_c10d._get_default_group()
    model_group = mpu.get_model_parallel_group()
    leader_rank = min(dist.get_process_group_ranks(model_group))
    return ParallelState(
        platform=Platform(device=torch.device("meta"), backend="fake"),
        rank=rank,
        world_size=layout.world_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=layout.tp,
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=layout.pp,
        vpp_size=layout.vpp,
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=layout.dp,
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        model_group=model_group,
        leader_group=None,
        cpu_group=world,
        leader_rank=leader_rank,
        store=dist.HashStore(),
    )


def _shard_rank(layout: Layout, cp_rank: int, dp_rank: int) -> int:
    return cp_rank + layout.cp * dp_rank


def _buffers(chunks: list[torch.nn.Module], layout: Layout, shard_rank: int) -> Iterator[BufferInfo]:
    """Gradient buffers; the distributed optimizer gives every rank with the same weights a part of every bucket."""
    sharded = layout.megatron.use_distributed_optimizer
    for chunk in chunks:
        for buffer in chunk.buffers:
            pieces = []
            for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
                low, high = start, end
                if sharded:
                    bucket = buffer.buckets[bucket_id]
                    part = bucket.grad_data.numel() // layout.shards
                    low = max(start, bucket.offset + shard_rank * part)
                    high = min(end, bucket.offset + (shard_rank + 1) * part)
                pieces.append(max(0, high - low))
            yield BufferInfo(
                numel=buffer.numel,
                buckets=tuple(bucket.grad_data.numel() for bucket in buffer.buckets),
                owned=sum(pieces),
                largest_owned=max(pieces),
                param_itemsize=buffer.param_dtype.itemsize,
                holds_parameters=sharded,
            )
