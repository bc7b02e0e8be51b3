"""Selection by covariance that stays on a CUDA device: :func:`select_tokens` of one rank without waiting for it.

A selection over several ranks exchanges values through the host (``select_tokens``): a copy of the columns waits for
the device once, because what a rank sends depends on how many candidates it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, TokenSet, judge_of
from spear_megatron.kernels.cov_select_cuda import CovColumns, CovNumbers, choose, means, pack


@dataclass(frozen=True, slots=True)
class DeviceSelection:
    """The chosen tokens, bool [m] per row, and the numbers of a ``Selection``; all on the device."""

    masks: list[Tensor]
    numbers: CovNumbers


def select_on_device(
    rows: Sequence[TokenSet], rule: ClipCovRule | KlCovRule, mask: Tensor | None = None
) -> DeviceSelection:
    """Choose among these rows alone what ``select_tokens(rows, rule)`` chooses, token for token.

    Args:
        rows: at least one, on one CUDA device.
        rule: how to choose.
        mask: bool [m], the tokens of the only row that take part; None: all. What stands at others has no effect.

    Raises:
        ValueError: a row's tensors differ in length, or a mask comes with several rows. That rows share their keys
            is not noticed, as a check would wait for the device: the first of equal tokens is taken.
        RunError: the CUDA kernels are missing or refuse the launch.
    """
    columns = _columns(rows)
    if mask is not None:
        if len(rows) != 1 or mask.shape != columns.keys.shape:
            raise ValueError("A mask needs a single row of its own length; select among several rows without one.")
        columns = pack(columns, mask)
    judge = judge_of(rule)
    numbers = means(columns, judge.lb, judge.ub)
    if isinstance(rule, ClipCovRule) and rule.quantiles is not None:
        numbers[3:5] = _quantiles(columns, numbers, rule.quantiles)
    chosen = choose(columns, numbers, rule.ratio, judge.log_bounds(), isinstance(rule, KlCovRule))
    masks = list(chosen.split([len(row.log_probs) for row in rows]))
    return DeviceSelection(masks, CovNumbers(*numbers.unbind()))


def _columns(rows: Sequence[TokenSet]) -> CovColumns:
    lengths = [len(row.log_probs) for row in rows]
    for row, length in zip(rows, lengths, strict=True):
        if not length == len(row.old_log_probs) == len(row.advantages) == len(row.keys):
            raise ValueError("A row's log_probs, old_log_probs, advantages and keys must have one length.")
    log_probs = _joined([row.log_probs for row in rows]).float()
    old_log_probs = _joined([row.old_log_probs for row in rows]).float()
    advantages = _joined([row.advantages for row in rows]).float()
    keys = _joined([row.keys for row in rows])
    starts = None
    if len(rows) > 1:
        # From pinned memory, so that the copy does not wait.
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, pin_memory=keys.is_cuda)
        starts = ends.to(keys.device, non_blocking=True)
    return CovColumns(log_probs, old_log_probs, advantages, keys, starts, len(rows), max(lengths), None)


def _joined(parts: list[Tensor]) -> Tensor:
    return (parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)).detach()


def _quantiles(columns: CovColumns, numbers: Tensor, quantiles: tuple[float, float]) -> Tensor:
    """Quantiles of the covariances as numpy interpolates them, fp64 [2]; 0 without tokens."""
    count, mean_advantage, mean_log_prob = numbers[:3].unbind()
    covariance = (columns.advantages.double() - mean_advantage) * (columns.log_probs.double() - mean_log_prob)
    used = torch.arange(len(covariance), device=covariance.device) < count
    broken = (used & covariance.isnan()).any()
    ordered = torch.where(used, covariance, math.inf).sort().values
    if len(ordered) == 0:
        return torch.zeros_like(numbers[3:5])
    last = (count - 1).clamp(min=0)
    # Scalars, so that no list of values travels to the device.
    bounds = torch.stack([_interpolated(ordered, last * quantile, last) for quantile in quantiles])
    return torch.where(count == 0, 0.0, torch.where(broken, math.nan, bounds))


def _interpolated(ordered: Tensor, index: Tensor, last: Tensor) -> Tensor:
    below = index.floor()
    share = index - below
    lower, upper = (torch.take(ordered, place.long()) for place in (below, torch.minimum(below + 1, last)))
    difference = upper - lower
    return torch.where(share >= 0.5, upper - difference * (1 - share), lower + difference * share)
