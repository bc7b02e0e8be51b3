"""From per-token losses to one number: the four aggregations as weights on tokens.

B and the token count belong to one optimizer step and all ranks, so the loss is a plain sum of weighted tokens that no
layout, packing or micro-batch split can change. Modes: token-mean (DAPO, arXiv 2503.14476, equation 8),
seq-mean-token-mean (GRPO, arXiv 2402.03300, equation 3), seq-mean-token-sum, and seq-mean-token-sum-norm
(Dr. GRPO, arXiv 2503.20783: a constant instead of the row's length).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
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
    """Size of one row set of one optimizer step, over all ranks. A row is a trajectory, all its segments together.

    Attributes:
        row_tokens: sampled tokens of every row by its id; rows whose mask is empty are there, padding never is.
    """

    row_tokens: Mapping[Hashable, int]

    @property
    def num_rows(self) -> int:
        """B of the means over rows."""
        return len(self.row_tokens)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return sum(self.row_tokens.values())


def count_totals(
    rows: Sequence[Hashable],
    masks: Sequence[torch.Tensor],
    gather: Callable[[dict[Hashable, int]], Sequence[Mapping[Hashable, int]]] = lambda own: [own],
) -> Totals:
    """Totals of a row set, given this data-parallel rank's share of its segments.

    Args:
        rows: id of the row that each segment belongs to; the segments of a row may be on different ranks.
        masks: bool [n_i], the sampled tokens of each segment.
        gather: the dictionaries of all data-parallel ranks, in rank order (default: there is one rank).
    """
    own: dict[Hashable, int] = {}
    for row, mask in zip(rows, masks, strict=True):
        own[row] = own.get(row, 0) + int(mask.sum())
    tokens: dict[Hashable, int] = {}
    for part in gather(own):
        for row, count in part.items():
            tokens[row] = tokens.get(row, 0) + count
    return Totals(tokens)


def token_weights(
    mask: torch.Tensor, *, row: Hashable, mode: str, totals: Totals, max_response_length: int
) -> torch.Tensor:
    """Weight of every token of one segment; the aggregate of x is the sum over all segments of weight * x.

    Args:
        mask: bool [n], the segment's sampled tokens.
        row: id of the row that it belongs to.
        mode: a name of :data:`AGGREGATION_MODES`.
        totals: of the row set that normalises this segment (replayed rows have their own).
        max_response_length: the constant L of seq-mean-token-sum-norm, in tokens.

    Returns:
        float32 [n], 0 off the mask:
        token-mean 1 / tokens; seq-mean-token-sum 1 / B; seq-mean-token-mean 1 / (B * row's tokens);
        seq-mean-token-sum-norm 1 / (B * L).

    Raises:
        ValueError: unknown ``mode``.
    """
    weights = torch.zeros(len(mask), dtype=torch.float32)
    if not mask.any():
        return weights
    if mode == "token-mean":
        normaliser = totals.num_tokens
    elif mode == "seq-mean-token-sum":
        normaliser = totals.num_rows
    elif mode == "seq-mean-token-mean":
        normaliser = totals.num_rows * totals.row_tokens[row]
    elif mode == "seq-mean-token-sum-norm":
        normaliser = totals.num_rows * max_response_length
    else:
        raise ValueError(f"Aggregation mode {mode!r} is unknown; use one of {', '.join(AGGREGATION_MODES)}.")
    weights[mask] = 1.0 / normaliser
    return weights
