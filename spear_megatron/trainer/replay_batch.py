"""Computing a saved batch again with the trainer's model, on any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spear_megatron.algorithms.mismatch import (
    Mismatch, RowLogProbs, Sums, measure, response_positions, turn_numbers, version_lags,
)  # fmt: skip
from spear_megatron.data.batch_files import BatchRow, SavedBatch
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState
from spear_megatron.trainer.actor import Actor
from spear_megatron.trainer.mismatch_gate import row_pair
from spear_megatron.types import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedBatch:
    """What a saved batch gave when computed again, equal on every rank. Replayed rows enter ``nonfinite`` alone.

    Attributes:
        engine: trainer's log-probs now against the engine's.
        saved_engine: those saved with the batch against the engine's; None where none were saved.
        saved: trainer's log-probs now against those saved; None where none were saved.
        nonfinite: sampled tokens whose log-prob is now not finite.
        tokens: (turn, position, trainer's minus engine's log-prob) of tokens of the batch's policy version.
    """

    engine: Mismatch
    saved_engine: Mismatch | None
    saved: Mismatch | None
    nonfinite: int
    tokens: tuple[list[int], list[int], list[float]]


def replay_batch(actor: Actor, parallel: ParallelState, batch: SavedBatch, *, token_bound: float) -> ReplayedBatch:
    """Log-probs of all rows by the weights that ``actor`` holds; collective.

    Args:
        batch: the same on every rank; the rows are dealt over the data-parallel ranks.
        token_bound: see :class:`spear_megatron.algorithms.mismatch.BucketFigures`.
    """
    own = batch.rows[parallel.dp_rank :: parallel.dp_size]
    filled, _ = actor.log_probs([item.row for item in own])
    values = [row.old_log_probs for row in filled if row.old_log_probs is not None]
    fresh = [(item, value) for item, value in zip(own, values, strict=True) if not item.replayed]
    nonfinite = sum(int((~value[item.row.response_mask].isfinite()).sum()) for item, value in zip(own, values))

    def compared(pairs: Sequence[RowLogProbs]) -> Mismatch:
        def gather(sums: dict[str, Sums]) -> list[dict[str, Sums]]:
            return gather_objects(parallel, sums if parallel.is_leader else {})

        return measure(pairs, version=batch.info.policy_version, token_bound=token_bound, gather=gather)

    engine = compared([row_pair(item.row, value) for item, value in fresh])
    has_saved = any(item.log_probs is not None and not item.replayed for item in batch.rows)
    before = [(item.row, item.log_probs, value) for item, value in fresh if item.log_probs is not None]
    return ReplayedBatch(
        engine=engine,
        saved_engine=compared([row_pair(row, kept) for row, kept, _ in before]) if has_saved else None,
        saved=compared([_against(row, value, kept) for row, kept, value in before]) if has_saved else None,
        nonfinite=sum(gather_objects(parallel, nonfinite if parallel.is_leader else 0)),
        tokens=_tokens(parallel, fresh, batch.info.policy_version),
    )


def _against(row: Row, log_probs: torch.Tensor, kept: torch.Tensor) -> RowLogProbs:
    return RowLogProbs(
        log_probs=log_probs,
        rollout_log_probs=kept,
        mask=row.response_mask,
        policy_versions=row.policy_versions,
        first_turn=row.first_turn,
    )


def _tokens(
    parallel: ParallelState, rows: Sequence[tuple[BatchRow, torch.Tensor]], version: int
) -> tuple[list[int], list[int], list[float]]:
    turns, positions, differences = list[int](), list[int](), list[float]()
    for item, value in rows:
        row = item.row
        chosen = row.response_mask & (version_lags(row.response_mask, row.policy_versions, version) == 0)
        turns += turn_numbers(row.response_mask, row.first_turn)[chosen].tolist()
        positions += response_positions(row.response_mask)[chosen].tolist()
        differences += (value - row.rollout_log_probs)[chosen].tolist()
    parts = gather_objects(parallel, (turns, positions, differences) if parallel.is_leader else ([], [], []))
    return (
        [turn for part, _, _ in parts for turn in part],
        [position for _, part, _ in parts for position in part],
        [difference for _, _, part in parts for difference in part],
    )
