"""From per-token losses to one number: the four aggregations as weights on tokens.

B and the token count belong to one optimizer step and all ranks, so the loss is a plain sum of weighted tokens that no
layout, packing or micro-batch split can change. Modes: token-mean (DAPO, arXiv 2503.14476, equation 8),
seq-mean-token-mean (GRPO, arXiv 2402.03300, equation 3), seq-mean-token-sum, and seq-mean-token-sum-norm
(Dr. GRPO, arXiv 2503.20783: a constant instead of the row's length).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

AGGREGATION_MODES: tuple[str, ...] = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


@dataclass(frozen=True, slots=True)
class Totals:
    """Size of one row set of one optimizer step, over all ranks.

    Attributes:
        num_rows: B; rows whose mask is empty count, padding never does.
        num_tokens: sampled tokens.
    """

    num_rows: int
    num_tokens: int


def count_totals(masks: Sequence[torch.Tensor], reduce_sum: Callable[[torch.Tensor], torch.Tensor]) -> Totals:
    """Totals of the rows whose masks (bool [n_i]) this data-parallel rank holds.

    ``reduce_sum`` adds an int64 [2] tensor over the data-parallel ranks (identity on one).
    """
    local = torch.tensor([len(masks), sum(int(mask.sum()) for mask in masks)], dtype=torch.int64)
    num_rows, num_tokens = reduce_sum(local).tolist()
    return Totals(num_rows=int(num_rows), num_tokens=int(num_tokens))


def token_weights(mask: torch.Tensor, *, mode: str, totals: Totals, max_response_length: int) -> torch.Tensor:
    """Weight of every token of one row; the aggregate of x is the sum over all rows of weight * x.

    Args:
        mask: bool [n], the row's sampled tokens.
        mode: a name of :data:`AGGREGATION_MODES`.
        totals: of the row set that normalises this row (replayed rows have their own).
        max_response_length: the constant L of seq-mean-token-sum-norm, in tokens.

    Returns:
        float32 [n], 0 off the mask:
        token-mean 1 / tokens; seq-mean-token-sum 1 / B; seq-mean-token-mean 1 / (B * row's tokens);
        seq-mean-token-sum-norm 1 / (B * L).

    Raises:
        ValueError: unknown ``mode``.
    """
    weights = torch.zeros(len(mask), dtype=torch.float32)
    row_tokens = int(mask.sum())
    if row_tokens == 0:
        return weights
    if mode == "token-mean":
        normaliser = totals.num_tokens
    elif mode == "seq-mean-token-sum":
        normaliser = totals.num_rows
    elif mode == "seq-mean-token-mean":
        normaliser = totals.num_rows * row_tokens
    elif mode == "seq-mean-token-sum-norm":
        normaliser = totals.num_rows * max_response_length
    else:
        raise ValueError(f"Aggregation mode {mode!r} is unknown; use one of {', '.join(AGGREGATION_MODES)}.")
    weights[mask] = 1.0 / normaliser
    return weights
