"""Which tokens Clip-Cov and KL-Cov act on (arXiv 2505.22617, section 4): those that drive the entropy down.

The covariance of a token is (A - mean A)(logp - mean logp), means over the set of tokens. Clip-Cov draws uniformly
among tokens inside two bounds, KL-Cov takes the largest. The choice is decided over all ranks, by keys that belong to
the tokens: it is the same bit for bit for every split of the rows over ranks and every order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spear_megatron.algorithms.draw import Gather, smallest_across
from spear_megatron.algorithms.rounding import floor_share

_LOG_RATIO_LIMIT = 20.0
_NEAR = 1e-5
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TokenSet:
    """The sampled tokens of one row.

    Attributes:
        log_probs, old_log_probs, advantages: float32 [m]. log_probs are those of the covariance and of the ratio.
        keys: int64 [m], from :func:`token_keys` with a base of the row's own.
    """

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class ClipCovRule:
    """Draw max(floor(ratio * tokens), 1) tokens that PPO does not clip and whose covariance is in (lb, ub).

    Attributes:
        ratio: share of all tokens, not of the candidates; 0 draws none.
        lb, ub: exclusive bounds of the covariance.
        clip_ratio_low, clip_ratio_high: PPO clip range.
        quantiles: quantiles of the set's covariances that replace lb and ub, or None.
    """

    ratio: float
    lb: float
    ub: float
    clip_ratio_low: float
    clip_ratio_high: float
    quantiles: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class KlCovRule:
    """Take the max(floor(ratio * tokens), 1) tokens of largest covariance; a ratio of 0 takes none."""

    ratio: float


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen tokens, and numbers over all ranks.

    Attributes:
        masks: bool [m] on the CPU, one per row in the order given.
        num_tokens, num_candidates, num_selected: of the set; every token of finite covariance is a candidate of KL-Cov.
        num_near_bound: tokens within 1e-5 of lb or ub, which another rounding could move across; 0 for KL-Cov.
        lb, ub: bounds used; infinite for KL-Cov.
        mean_advantage, mean_log_prob: 0 for an empty set.
    """

    masks: list[torch.Tensor]
    num_tokens: int
    num_candidates: int
    num_selected: int
    num_near_bound: int
    lb: float
    ub: float
    mean_advantage: float
    mean_log_prob: float


def token_keys(base: int, count: int) -> torch.Tensor:
    """Keys of the positions 0 to ``count`` - 1 of a row: splitmix64 (Steele et al. 2014) of base + position.

    Args:
        base: 64-bit key of what the row is (seed, step, update, trajectory, segment), never of where it is.

    Returns:
        int64 [count], distinct.
    """
    word = np.arange(count, dtype=np.uint64) + np.uint64((base + 0x9E3779B97F4A7C15) & _WORD)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((word ^ (word >> np.uint64(31))).view(np.int64))


def select_tokens(
    rows: Sequence[TokenSet], rule: ClipCovRule | KlCovRule, gather: Gather = lambda own: [own]
) -> Selection:
    """Choose tokens among the rows of all data-parallel ranks; every rank calls this with its own rows.

    Args:
        rows: this rank's; copies on tensor, pipeline or context ranks must not be counted again.
        rule: how to choose.
        gather: values of all ranks, small arrays (all covariances once if bounds are quantiles). The default decides
            within these rows alone, as the released code does per micro-batch.

    Raises:
        ValueError: a row's tensors differ in length, or two rows share their keys.
    """
    tokens = _Tokens.of(rows)
    num_tokens, mean_advantage, mean_log_prob = _means(tokens, gather)
    with np.errstate(invalid="ignore", over="ignore"):
        covariance = (tokens.advantages - mean_advantage) * (tokens.log_probs - mean_log_prob)
    k = max(floor_share(rule.ratio, num_tokens), 1) if rule.ratio > 0 and num_tokens else 0
    columns = [tokens.keys, tokens.row_keys, tokens.positions, tokens.advantages, tokens.log_probs]
    lb, ub = -math.inf, math.inf
    candidates = np.isfinite(covariance)
    near = np.zeros(len(covariance), dtype=bool)
    if isinstance(rule, ClipCovRule):
        lb, ub = (rule.lb, rule.ub) if rule.quantiles is None else _quantiles(covariance, rule.quantiles, gather)
        candidates &= ~_ppo_clipped(tokens, rule) & (covariance > lb) & (covariance < ub)
        near = (np.abs(covariance - lb) <= _NEAR) | (np.abs(covariance - ub) <= _NEAR)
    else:
        columns.insert(0, -covariance)
    places = np.flatnonzero(candidates)
    chosen = np.zeros(len(covariance), dtype=bool)
    chosen[places] = smallest_across([column[places] for column in columns], k, gather)
    counts = np.sum(gather(np.array([candidates.sum(), chosen.sum(), near.sum()])), axis=0).tolist()
    return Selection(
        masks=list(torch.from_numpy(chosen).split(tokens.lengths)) if rows else [],
        num_tokens=num_tokens,
        num_candidates=counts[0],
        num_selected=counts[1],
        num_near_bound=counts[2],
        lb=lb,
        ub=ub,
        mean_advantage=mean_advantage,
        mean_log_prob=mean_log_prob,
    )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """All tokens of this rank, rows back to back: float64 [m], int64 [m]; log_ratio is float32, as in the loss."""

    log_probs: np.ndarray
    log_ratio: np.ndarray
    advantages: np.ndarray
    keys: np.ndarray
    row_keys: np.ndarray
    positions: np.ndarray
    lengths: list[int]

    @classmethod
    def of(cls, rows: Sequence[TokenSet]) -> _Tokens:
        lengths = [len(row.log_probs) for row in rows]
        for row, length in zip(rows, lengths, strict=True):
            if not length == len(row.old_log_probs) == len(row.advantages) == len(row.keys):
                raise ValueError("A row's log_probs, old_log_probs, advantages and keys must have one length.")
        floats = np.zeros((3, 0), dtype=np.float32)
        keys = np.zeros(0, dtype=np.int64)
        if rows:
            # One copy from the device for everything.
            fields = ("log_probs", "old_log_probs", "advantages")
            parts = [torch.cat([getattr(row, name) for row in rows]).detach().float() for name in fields]
            floats = torch.stack(parts).cpu().numpy()
            keys = torch.cat([row.keys for row in rows]).cpu().numpy()
        starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, dtype=np.int64)
        first = [keys[start] if length else 0 for start, length in zip(starts, lengths, strict=True)]
        return cls(
            log_probs=floats[0].astype(np.float64),
            log_ratio=floats[0] - floats[1],
            advantages=floats[2].astype(np.float64),
            keys=keys,
            row_keys=np.repeat(np.array(first, dtype=np.int64), lengths),
            positions=np.arange(len(keys)) - np.repeat(starts, lengths),
            lengths=lengths,
        )


def _means(tokens: _Tokens, gather: Gather) -> tuple[int, float, float]:
    """(tokens, mean advantage, mean log-prob) over all ranks. Rows are added exactly: order has no effect."""
    ends = np.cumsum(tokens.lengths, dtype=np.int64)
    spans = [slice(end - length, end) for end, length in zip(ends, tokens.lengths, strict=True)]
    own = np.array([[s.stop - s.start, tokens.advantages[s].sum(), tokens.log_probs[s].sum()] for s in spans])
    sums = np.concatenate(gather(own.reshape(-1, 3)))
    count = int(sums[:, 0].sum())
    if count == 0:
        return 0, 0.0, 0.0
    if not np.isfinite(sums).all():  # a step that the trainer will skip: no covariance, no selection
        return count, math.nan, math.nan
    return count, math.fsum(sums[:, 1]) / count, math.fsum(sums[:, 2]) / count


def _quantiles(covariance: np.ndarray, quantiles: tuple[float, float], gather: Gather) -> tuple[float, float]:
    """Quantiles of the covariances of all ranks, interpolated linearly; 0 for an empty set."""
    everything = np.concatenate(gather(covariance))
    if len(everything) == 0:
        return 0.0, 0.0
    lower, upper = np.quantile(everything, quantiles)
    return float(lower), float(upper)


def _ppo_clipped(tokens: _Tokens, rule: ClipCovRule) -> np.ndarray:
    """Where clip(r) A < r A. Compared as logarithms: an exponential's last bit may depend on the array around it."""
    log_ratio = np.clip(tokens.log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).astype(np.float64)
    upper = math.log1p(rule.clip_ratio_high)
    lower = math.log1p(-rule.clip_ratio_low) if rule.clip_ratio_low < 1 else -math.inf
    return ((tokens.advantages > 0) & (log_ratio > upper)) | ((tokens.advantages < 0) & (log_ratio < lower))
