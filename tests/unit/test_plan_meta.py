"""Every rank of a large layout, built without memory: the shards of a model add up to it, tensor by tensor."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from qwen_sizes import QWEN25_32B, QWEN3_32B, TINY

from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.meta import RankModel, build_rank


def layout(tp: int, pp: int, vpp: int | None = None, dp: int = 1, **options: Any) -> Layout:
    sizes = MegatronConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **options,
    )
    return Layout(megatron=sizes, world_size=tp * pp * dp)


def ranks_of_one_replica(shape: ModelShape, where: Layout) -> list[RankModel]:
    wanted = [(tp, pp) for pp in range(where.pp) for tp in range(where.tp)]
    built = [build_rank(shape, where, where.rank_of(tp_rank=tp, dp_rank=0, pp_rank=pp)) for tp, pp in wanted]
    assert [(rank.tp_rank, rank.pp_rank, rank.dp_rank) for rank in built] == [(tp, pp, 0) for tp, pp in wanted]
    return built


def held(ranks: list[RankModel], shape: ModelShape) -> dict[str, int]:
    """Elements of every Hugging Face tensor over all ranks, replicas counted once; checks that no row is held twice."""
    covered: dict[str, list[tuple[int, int]]] = {}
    replicas: dict[str, set[int]] = {}
    for rank in ranks:
        for name, pieces in rank.pieces.items():
            replicas.setdefault(name, set()).add(rank.pp_rank)
            (piece,) = pieces
            if piece.replicated and rank.tp_rank:
                continue
            runs = piece.runs[rank.tp_rank]
            covered.setdefault(name, []).extend((run.hf_start, run.hf_start + run.length) for run in runs)
            shape_here = piece.parameter.shape
            assert sum(run.length for run in runs) <= shape_here[piece.dim]
    elements = {}
    for name, spans in covered.items():
        assert len(replicas[name]) == 1, f"{name} is on several pipeline stages"
        spans.sort()
        assert all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False)), name
        hf_shape = shape.parameter_shapes()[name]
        (piece,) = next(rank.pieces[name] for rank in ranks if name in rank.pieces)
        assert spans[0][0] == 0 and spans[-1][1] == hf_shape[piece.dim]
        elements[name] = (spans[-1][1] - spans[0][0]) * prod(hf_shape) // hf_shape[piece.dim]
    return elements


@pytest.mark.parametrize(("shape", "total"), [(QWEN25_32B, 32_763_876_352), (QWEN3_32B, 32_762_123_264)])
@pytest.mark.parametrize(
    "where", [layout(8, 4), layout(4, 8, 2), layout(8, 2)], ids=lambda value: value.describe()
)
def test_the_shards_of_a_32b_model_add_up(shape: ModelShape, total: int, where: Layout) -> None:
    ranks = ranks_of_one_replica(shape, where)
    elements = held(ranks, shape)
    assert list(elements) and elements == {name: prod(size) for name, size in shape.parameter_shapes().items()}
    assert sum(elements.values()) == total
    per_chunk = shape.num_layers // (where.pp * where.megatron.num_chunks)
    assert {rank.layers for rank in ranks} == {(per_chunk,) * where.megatron.num_chunks}
    # what ranks hold beyond the model: norms on every tensor rank, and the padding of the vocabulary
    replicated = sum(
        info.numel * (where.tp - 1)
        for rank in ranks
        if rank.tp_rank == 0
        for name, info in rank.parameters.items()
        if "norm" in name
    )
    padding = 2 * (-shape.vocab_size % 64) * shape.hidden_size
    assert sum(rank.num_parameters for rank in ranks) == total + replicated + padding


def test_nothing_is_allocated_and_no_group_stays() -> None:
    rank = build_rank(QWEN3_32B, layout(8, 4, dp=4), 0, with_buffers=True)
    assert not dist.is_initialized() and torch.empty(1).device.type == "cpu"
    assert all(piece.parameter.is_meta for pieces in rank.pieces.values() for piece in pieces)
    assert {info.dtype for info in rank.parameters.values()} == {torch.bfloat16}
    assert rank.parameters["0.decoder.layers.0.mlp.linear_fc1.weight"].shape == (2 * 25600 // 8, 5120)
    # Megatron's marks stay on parameters that were made on the meta device, and are lost on those that were moved there
    (embedding,) = rank.pieces["model.embed_tokens.weight"]
    assert embedding.parameter.tensor_model_parallel
    with torch.device("meta"):
        assert torch.empty(1).is_meta
    assert rank.num_parameters * 2 == sum(info.nbytes for info in rank.parameters.values())


@pytest.mark.parametrize("dp", [1, 3])
def test_the_owned_shares_of_a_buffer_add_up_to_its_parameters(dp: int) -> None:
    where = layout(2, 2, dp=dp)
    for pp in range(2):
        of_stage = [
            build_rank(TINY, where, where.rank_of(tp_rank=1, dp_rank=index, pp_rank=pp), with_buffers=True)
            for index in range(dp)
        ]
        (padded,) = {rank.buffers[0].numel for rank in of_stage}
        assert padded % dp == 0 and padded >= of_stage[0].num_parameters
        assert sum(rank.buffers[0].owned for rank in of_stage) == of_stage[0].num_parameters


def test_a_shared_embedding_has_a_bucket_of_its_own() -> None:
    (buffer,) = build_rank(TINY, layout(1, 2), 1, with_buffers=True).buffers
    assert len(buffer.buckets) == 2 and sum(buffer.buckets) == buffer.numel


def test_without_the_distributed_optimizer_every_rank_owns_everything() -> None:
    where = layout(1, 1, dp=2, use_distributed_optimizer=False)
    (buffer,) = build_rank(TINY, where, 1, with_buffers=True).buffers
    assert buffer.owned == buffer.numel == TINY.num_parameters() + (-TINY.vocab_size % 64) * TINY.hidden_size
    assert not buffer.holds_parameters


def test_ranks_and_worlds_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="rank=4"):
        build_rank(TINY, layout(2, 2), 4)
    with pytest.raises(ValueError, match="world_size=6"):
        Layout(megatron=MegatronConfig(tensor_model_parallel_size=4), world_size=6)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="already initialised"):
            build_rank(TINY, layout(2, 2), 0)
    finally:
        dist.destroy_process_group()
