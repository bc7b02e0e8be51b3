"""Hugging Face safetensors straight into the shards of the Megatron model; full tensors back out, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.weight_map import Piece, local_pieces
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.paths import os_error_text
from spear_megatron.parallel.state import ParallelState

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

Kind = Literal["param", "main_grad"]


def load_hf_folder(
    model_chunks: Sequence[MegatronModule], shape: ModelShape, folder: str | Path, parallel: ParallelState
) -> None:
    """Fill the model with the weights of ``folder`` (config.json beside one or more safetensors files). Collective.

    Every rank reads only the rows and columns of its own shard. Names, shapes and dtypes of all tensors are checked
    on every rank before a weight is touched. Values are cast to the model's dtype; padding rows become 0. An
    optimizer that exists already must be told (``optimizer.reload_model_params()``): it keeps its own copy.

    Raises:
        ValueError: on every rank alike: a missing, unknown or misshapen tensor or a damaged file; names both.
    """
    weights, problem = None, None
    try:
        weights = HFWeights.open(folder, shape)
    except (ValueError, OSError) as error:
        problem = (os_error_text(error) if isinstance(error, OSError) else None) or str(error)
    problems = [text for text in gather_objects(parallel, problem) if text is not None]
    if problems or weights is None:
        raise ValueError(problems[0])
    with torch.no_grad(), weights:
        for name, pieces in local_pieces(model_chunks, shape, parallel.tp_size).items():
            for piece in pieces:
                _load_piece(weights, name, piece, parallel.tp_rank)


def iter_hf_tensors(
    model_chunks: Sequence[MegatronModule],
    shape: ModelShape,
    parallel: ParallelState,
    kind: Kind = "param",
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every Hugging Face tensor of the model, in the order of ``shape.parameter_shapes()``. Collective.

    All ranks of a model must iterate to the end. Each data-parallel leader (tp_rank 0, pp_rank 0) gets
    (name, full tensor), a fresh contiguous CPU tensor; the other ranks get (name, None). One tensor is in flight at
    a time: tensor ranks gather it on their first rank, which sends it to the first pipeline stage.

    Args:
        kind: the weights, or the accumulated gradients (``main_grad``, after Megatron's ``finalize_model_grads``).
            With the distributed optimizer the gradient shards are first gathered over the data-parallel ranks, in
            place; a rank's own shard is not changed by it.
        dtype: cast to it; None keeps the weights' dtype (float32 for gradients).
    """
    if kind not in ("param", "main_grad"):
        raise ValueError(f"kind must be param or main_grad, got {kind!r}")
    if kind == "main_grad":
        _complete_gradients(model_chunks)
    pieces = local_pieces(model_chunks, shape, parallel.tp_size)
    owners = owning_stages(pieces, parallel)
    for name, hf_shape in shape.parameter_shapes().items():
        yield name, _full_tensor(pieces, name, hf_shape, owners[name], parallel, kind, dtype)


def _load_piece(weights: HFWeights, name: str, piece: Piece, tp_rank: int) -> None:
    target = piece.parameter.data
    for run in piece.runs[tp_rank]:
        part = weights.read(name, piece.dim, run.hf_start, run.length)
        target.narrow(piece.dim, run.local_start, run.length).copy_(part)
    filled = sum(run.length for run in piece.runs[tp_rank])
    if piece.padded:
        target[filled:].zero_()


def owning_stages(pieces: dict[str, list[Piece]], parallel: ParallelState) -> dict[str, int]:
    """Hugging Face name -> first pipeline rank that holds it (tied embeddings live on the first and the last)."""
    stages: list[list[str]] = [[] for _ in range(parallel.pp_size)]
    if parallel.pp_size == 1:
        stages[0] = list(pieces)
    else:
        dist.all_gather_object(stages, list(pieces), group=parallel.pp_group)
    owners: dict[str, int] = {}
    for stage, names in enumerate(stages):
        for name in names:
            owners.setdefault(name, stage)
    return owners


def _full_tensor(
    pieces: dict[str, list[Piece]],
    name: str,
    hf_shape: tuple[int, ...],
    owner: int,
    parallel: ParallelState,
    kind: Kind,
    dtype: torch.dtype | None,
) -> torch.Tensor | None:
    """The full tensor on the leader, None elsewhere."""
    full = None
    if parallel.pp_rank == owner:
        full = _gather_tensor_parallel(pieces[name][0], hf_shape, parallel, kind)
    if owner != 0 and parallel.tp_rank == 0:
        # every stage holds some parameter, and all weights have one dtype
        sent_dtype = torch.float32 if kind == "main_grad" else next(iter(pieces.values()))[0].parameter.dtype
        full = _send_to_first_stage(full, owner, hf_shape, sent_dtype, parallel)
    if not parallel.is_leader or full is None:
        return None
    return full.to(device="cpu", dtype=dtype or full.dtype)


def _gather_tensor_parallel(
    piece: Piece, hf_shape: tuple[int, ...], parallel: ParallelState, kind: Kind
) -> torch.Tensor | None:
    """Concatenate the runs of every tensor rank on tp_rank 0 (fresh memory); None on the others."""
    local: torch.Tensor = getattr(piece.parameter, "data" if kind == "param" else "main_grad")
    if piece.replicated or parallel.tp_size == 1:
        return _assemble([local], piece, hf_shape) if parallel.tp_rank == 0 else None
    own = [local.narrow(piece.dim, run.local_start, run.length) for run in piece.runs[parallel.tp_rank]]
    longest = max(sum(run.length for run in runs) for runs in piece.runs)
    buffer_shape = list(hf_shape)
    buffer_shape[piece.dim] = longest
    buffer = local.new_zeros(buffer_shape)
    if own:
        packed = torch.cat(own, dim=piece.dim)
        buffer.narrow(piece.dim, 0, packed.shape[piece.dim]).copy_(packed)
    receivers = [torch.empty_like(buffer) for _ in range(parallel.tp_size)] if parallel.tp_rank == 0 else None
    dist.gather(buffer, receivers, group=parallel.tp_group, group_dst=0)
    if receivers is None:
        return None
    return _assemble(receivers, piece, hf_shape, packed=True)


def _assemble(
    parts: list[torch.Tensor], piece: Piece, hf_shape: tuple[int, ...], packed: bool = False
) -> torch.Tensor:
    """Copy the runs of every part to their place. ``packed``: a part holds its runs back to back from 0."""
    full = parts[0].new_empty(hf_shape)
    for part, runs in zip(parts, piece.runs):
        start = 0
        for run in runs:
            source = start if packed else run.local_start
            full.narrow(piece.dim, run.hf_start, run.length).copy_(part.narrow(piece.dim, source, run.length))
            start += run.length
    return full


def _send_to_first_stage(
    full: torch.Tensor | None, owner: int, hf_shape: tuple[int, ...], dtype: torch.dtype, parallel: ParallelState
) -> torch.Tensor | None:
    if parallel.pp_rank == owner:
        assert full is not None
        dist.send(full, group=parallel.pp_group, group_dst=0)
        return None
    if parallel.pp_rank != 0:
        return None
    received = torch.empty(hf_shape, dtype=dtype, device=parallel.platform.device)
    dist.recv(received, group=parallel.pp_group, group_src=owner)
    return received


def _complete_gradients(model_chunks: Sequence[MegatronModule]) -> None:
    """All-gather what the distributed optimizer reduced into shards, so that every ``main_grad`` is whole."""
    for chunk in model_chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in chunk.buffers:
            group = buffer.data_parallel_group
            if group.size() == 1:
                continue
            for bucket in buffer.buckets:
                own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
