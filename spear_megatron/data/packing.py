"""Packing rows into THD micro-batches of one token length, and taking per-token results apart again.

A row of n tokens takes ``packed_length(row)`` <= n - 1 positions: position t predicts token t + 1, and nothing after
the last sampled token can change the loss of a causal model. Under context parallelism every sequence is padded at its
end to a multiple of what it is cut into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from spear_megatron.types import MicroBatch, Row, TrainBatch, TrajectoryId

RowKey = tuple[TrajectoryId, int]


@dataclass(frozen=True, slots=True)
class WeightedRow:
    """A row and what one optimizer step adds to its tokens.

    Attributes:
        weights: float32 [n], 1 / normaliser times every constant factor.
        surrogate_weight: float32 [n], off-policy correction of the surrogate; None for 1.
        selected: bool [n], tokens that covariance regularisation acts on; None for none.
        token_keys: int64 [n], keys of a covariance draw inside the loss; None where there is none.
        replayed: whether the row belongs to the self-imitation term.
    """

    row: Row
    weights: torch.Tensor
    surrogate_weight: torch.Tensor | None = None
    selected: torch.Tensor | None = None
    token_keys: torch.Tensor | None = None
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """``bins[k]``: positions (in the caller's row list) of micro-batch k, ascending by row id; empty for a dummy."""

    bins: tuple[tuple[int, ...], ...]
    token_length: int
    sequence_multiple: int = 1


def row_key(row: Row) -> RowKey:
    """Identity of a row across ranks."""
    return (row.trajectory, row.segment)


def packed_length(response_mask: torch.Tensor) -> int:
    """Positions that a row with this mask (bool [n]) needs: the index of its last sampled token, 0 without any.

    Raises:
        ValueError: the first token is marked as sampled, though nothing precedes it.
    """
    if len(response_mask) and bool(response_mask[0]):
        raise ValueError("The first token of a row is marked as sampled; a row starts with at least one prompt token.")
    hits = torch.nonzero(response_mask)
    return int(hits[-1]) if len(hits) else 0


def plan_packing(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    length_multiple: int = 1,
    sequence_multiple: int = 1,
    count_multiple: int = 1,
    reduce_max: Callable[[int], int] = lambda count: count,
) -> PackingPlan:
    """Split rows over micro-batches: a pure function of the lengths, independent of the order they arrive in.

    First-fit decreasing finds how few micro-batches the budget allows; the rows are then dealt over that many, longest
    first to the emptiest one, because the fullest decides how long all of them are padded.

    Args:
        lengths: packed length of every row of this data-parallel rank, in id order; rows of length 0 are left out.
        max_tokens: budget of one micro-batch (``ppo_max_token_len_per_gpu``).
        length_multiple: the token length is a multiple of this (the tensor-parallel size with sequence parallelism),
            which is a multiple of ``sequence_multiple``.
        sequence_multiple: every packed sequence is padded to a multiple of this (context parallelism).
        count_multiple: the number of micro-batches is a multiple of this (the pipeline size with VPP).
        reduce_max: maximum over data-parallel ranks, so that all run the same number of micro-batches.

    Raises:
        ValueError: one row alone exceeds the budget.
    """
    lengths = [length + -length % sequence_multiple for length in lengths]
    budget = max_tokens // length_multiple * length_multiple
    order = sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > budget:
        raise ValueError(
            f"A row of {lengths[order[0]]} tokens does not fit a micro-batch of {budget}; "
            "raise actor_rollout_ref.actor.ppo_max_token_len_per_gpu."
        )
    tight = _first_fit(order, lengths, budget)
    count = max(reduce_max(len(tight)), 1)
    count += -count % count_multiple
    even = _deal(order, lengths, count)
    bins = even if _fullest(even, lengths) <= _fullest(tight, lengths) else tight
    bins = bins + [[] for _ in range(count - len(bins))]
    longest = max(_fullest(bins, lengths), 1)
    token_length = longest + -longest % length_multiple
    return PackingPlan(tuple(tuple(sorted(rows)) for rows in bins), token_length, sequence_multiple)


def _first_fit(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in order:
        for k, load in enumerate(loads):
            if load + lengths[i] <= budget:
                bins[k].append(i)
                loads[k] += lengths[i]
                break
        else:
            bins.append([i])
            loads.append(lengths[i])
    return bins


def _deal(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in order:
        k = loads.index(min(loads))
        bins[k].append(i)
        loads[k] += lengths[i]
    return bins


def _fullest(bins: Iterable[Sequence[int]], lengths: Sequence[int]) -> int:
    return max((sum(lengths[i] for i in rows) for rows in bins), default=0)


def pack(rows: Sequence[WeightedRow], plan: PackingPlan) -> TrainBatch:
    """Micro-batches of a plan made for ``packed_length`` of exactly these rows, in this order.

    Padding is one more sequence at the end with weight 0 and mask False. ``num_rows`` and ``num_tokens`` of the result
    count what this rank packed: real sequences and their sampled tokens.
    """
    micro_batches = tuple(_micro_batch([rows[i] for i in members], plan) for members in plan.bins)
    longest = max(int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max()) for batch in micro_batches)
    return TrainBatch(
        micro_batches=micro_batches,
        max_seqlen=longest,
        num_rows=sum(len(batch.rows) for batch in micro_batches),
        num_tokens=sum(int(batch.loss_mask.sum()) for batch in micro_batches),
    )


def _micro_batch(members: Sequence[WeightedRow], plan: PackingPlan) -> MicroBatch:
    token_length = plan.token_length
    lengths = [packed_length(member.row.response_mask) for member in members]
    lengths = [length + -length % plan.sequence_multiple for length in lengths]
    used = sum(lengths)
    assert used <= token_length
    if used < token_length:
        lengths = [*lengths, token_length - used]

    def lay(values: Sequence[torch.Tensor | None], shift: int, dtype: torch.dtype, empty: float = 0) -> torch.Tensor:
        packed = torch.full((token_length,), empty, dtype=dtype)
        start = 0
        for value, length in zip(values, lengths, strict=False):
            if value is not None:
                part = value[shift : shift + length]
                packed[start : start + len(part)] = part
            start += length
        return packed

    rows = [member.row for member in members]
    mask = lay([row.response_mask for row in rows], 1, torch.bool)
    weights = lay([member.weights for member in members], 1, torch.float32)
    offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return MicroBatch(
        tokens=lay([row.ids for row in rows], 0, torch.int64),
        targets=lay([row.ids for row in rows], 1, torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=offsets.to(torch.int32),
        loss_mask=mask,
        token_weight=weights * mask,
        advantages=lay([row.advantages for row in rows], 1, torch.float32),
        old_log_probs=lay([row.old_log_probs for row in rows], 1, torch.float32),
        rollout_log_probs=lay([row.rollout_log_probs for row in rows], 1, torch.float32),
        ref_log_probs=lay([row.ref_log_probs for row in rows], 1, torch.float32),
        surrogate_weight=lay([member.surrogate_weight for member in members], 1, torch.float32, empty=1.0),
        replayed=lay([_constant(member.replayed, member.row) for member in members], 1, torch.bool),
        selected=lay([member.selected for member in members], 1, torch.bool),
        token_keys=lay([member.token_keys for member in members], 1, torch.int64),
        rows=tuple(row_key(row) for row in rows),
    )


def _constant(value: bool, row: Row) -> torch.Tensor | None:
    return torch.ones(len(row.ids), dtype=torch.bool) if value else None


def share_of_micro_batch(rows: Sequence[WeightedRow], plan: PackingPlan) -> list[WeightedRow]:
    """Rows whose weights are multiplied by the number of rows of the same term in their micro-batch.

    The released SPEAR code weighs a micro-batch by its share of the mini-batch's rows but does not divide by its own,
    so that the gradient depends on the packing. Kept for parity alone.
    """
    shared = list(rows)
    for members in plan.bins:
        for i in members:
            count = sum(rows[j].replayed == rows[i].replayed for j in members)
            shared[i] = replace(rows[i], weights=rows[i].weights * count)
    return shared


def unpack(batch: TrainBatch, values: Sequence[torch.Tensor], rows: Sequence[Row]) -> list[torch.Tensor]:
    """Per-token results back on their rows.

    Args:
        batch: what was packed from ``rows``.
        values: one float32 [T] per micro-batch, aligned with ``targets``.
        rows: the rows, in any order; those that were left out of the packing get zeros.

    Returns:
        One float32 [n] per row, aligned with ``ids``; 0 where the response mask is False.
    """
    pieces: dict[RowKey, torch.Tensor] = {}
    for micro_batch, value in zip(batch.micro_batches, values, strict=True):
        offsets = micro_batch.cu_seqlens.tolist()
        for key, start, end in zip(micro_batch.rows, offsets, offsets[1:], strict=False):
            pieces[key] = torch.where(micro_batch.loss_mask[start:end], value[start:end], 0.0)
    results = []
    for row in rows:
        full = torch.zeros(len(row.ids), dtype=torch.float32)
        piece = pieces.get(row_key(row))
        if piece is not None:
            full[1 : 1 + len(piece)] = piece[: len(full) - 1]
        results.append(full)
    return results
