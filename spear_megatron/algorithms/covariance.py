"""Which tokens Clip-Cov and KL-Cov act on (arXiv 2505.22617, section 4): those that drive the entropy down.

The covariance of a token is (A - mean A)(logp - mean logp), means over the set of tokens. Clip-Cov draws uniformly
among tokens inside two bounds, KL-Cov takes the largest. The choice is decided over all ranks, by keys that belong to
the tokens: it is the same bit for bit for every split of the rows over ranks and every order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from spear_megatron.algorithms.draw import Gather, alone, smallest_across
from spear_megatron.algorithms.rounding import floor_share
from spear_megatron.kernels.cov_select import (
    Chosen,
    CovJudge,
    CovTokens,
    cov_candidates,
    cov_selected,
    covariances,
    row_sums,
    token_keys,
    use_compiled,
)

__all__ = ["ClipCovRule", "KlCovRule", "Selection", "TokenSet", "judge_of", "select_tokens", "token_keys"]


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


def select_tokens(
    rows: Sequence[TokenSet],
    rule: ClipCovRule | KlCovRule,
    gather: Gather = alone,
    implementation: str = "auto",
) -> Selection:
    """Choose tokens among the rows of all data-parallel ranks; every rank calls this with its own rows.

    Tokens on a device are copied to the host, which waits for it: what a rank sends depends on its candidates. Within
    one rank :func:`spear_megatron.algorithms.covariance_device.select_on_device` does not wait.

    Args:
        rows: this rank's; copies on tensor, pipeline or context ranks must not be counted again.
        rule: how to choose.
        gather: values of all ranks, small arrays (all covariances once if bounds are quantiles). The default decides
            within these rows alone, as the released code does per micro-batch, in one call of the compiled kernel.
        implementation: of the local part, see :func:`cov_candidates`; no effect on what is chosen.

    Raises:
        ValueError: a row's tensors differ in length, or two rows share their keys.
    """
    tokens = _Tokens.of(rows)
    if gather is alone and use_compiled(implementation):
        selection = _select_here(tokens, rule)
        if selection is not None:
            return selection
    means = _means(tokens, gather, implementation)
    k = max(floor_share(rule.ratio, means.num_tokens), 1) if rule.ratio > 0 and means.num_tokens else 0
    judge = CovJudge(means.advantage, means.log_prob)
    if isinstance(rule, ClipCovRule):
        lb, ub = rule.lb, rule.ub
        if rule.quantiles is not None:
            lb, ub = _quantiles(covariances(tokens.values, means.advantage, means.log_prob), rule.quantiles, gather)
        judge = judge_of(rule)._replace(mean_advantage=means.advantage, mean_log_prob=means.log_prob, lb=lb, ub=ub)
    chosen = _chosen_anywhere(tokens, judge, k, isinstance(rule, KlCovRule), gather, implementation)
    return Selection(
        masks=list(chosen.mask.split(tokens.lengths)) if rows else [],
        num_tokens=means.num_tokens,
        num_candidates=chosen.num_candidates,
        num_selected=chosen.num_chosen,
        num_near_bound=chosen.num_near_bound,
        lb=judge.lb,
        ub=judge.ub,
        mean_advantage=means.advantage,
        mean_log_prob=means.log_prob,
    )


def judge_of(rule: ClipCovRule | KlCovRule) -> CovJudge:
    """The rule's bounds and clips, before the means are known."""
    if isinstance(rule, KlCovRule):
        return CovJudge(0.0, 0.0)
    return CovJudge(0.0, 0.0, rule.lb, rule.ub, rule.clip_ratio_low, rule.clip_ratio_high)


def _select_here(tokens: _Tokens, rule: ClipCovRule | KlCovRule) -> Selection | None:
    """The selection where one rank has all tokens, in one call of the kernel.

    None where that does not decide: tokens tie at the border, quantiles are asked for, or there is nothing to choose.
    """
    num_tokens = len(tokens.parts[0])
    if not rule.ratio > 0 or num_tokens == 0 or (isinstance(rule, ClipCovRule) and rule.quantiles is not None):
        return None
    judge, by_covariance = judge_of(rule), isinstance(rule, KlCovRule)
    found = cov_selected(tokens.parts, tokens.lengths, rule.ratio, judge, by_covariance=by_covariance)
    if found.num_chosen > found.k:
        return None
    return Selection(
        masks=[found.mask] if len(tokens.lengths) == 1 else list(found.mask.split(tokens.lengths)),
        num_tokens=num_tokens,
        num_candidates=found.num_candidates,
        num_selected=found.num_chosen,
        num_near_bound=found.num_near_bound,
        lb=judge.lb,
        ub=judge.ub,
        mean_advantage=found.mean_advantage,
        mean_log_prob=found.mean_log_prob,
    )


def _chosen_anywhere(
    tokens: _Tokens, judge: CovJudge, k: int, by_covariance: bool, gather: Gather, implementation: str
) -> Chosen:
    """This rank's part of the choice over all ranks, and their counts."""
    # One more than can be chosen: it shows whether equal tokens stand at the border.
    values = tokens.values
    found = cov_candidates(values, judge, k + 1, by_covariance=by_covariance, implementation=implementation)
    columns = tokens.columns(found.places)
    if by_covariance:
        columns.insert(0, -(columns[3] - judge.mean_advantage) * (columns[4] - judge.mean_log_prob))
    chosen = np.zeros(len(values.keys), dtype=bool)
    chosen[found.places] = smallest_across(columns, k, gather)
    own = np.array([found.num_candidates, found.num_near_bound, np.count_nonzero(chosen)])
    num_candidates, num_near_bound, num_chosen = np.sum(gather(own), axis=0).tolist()
    return Chosen(num_candidates, num_near_bound, num_chosen, torch.from_numpy(chosen))


@dataclass(frozen=True, slots=True)
class _Tokens:
    """All tokens of this rank, rows back to back.

    Attributes:
        parts: log-probs, old log-probs, advantages (float32 [T]) and keys (int64 [T]), contiguous, on the host.
    """

    parts: list[torch.Tensor]
    lengths: list[int]

    @classmethod
    def of(cls, rows: Sequence[TokenSet]) -> _Tokens:
        lengths = [len(row.log_probs) for row in rows]
        for row, length in zip(rows, lengths, strict=True):
            if not length == len(row.old_log_probs) == len(row.advantages) == len(row.keys):
                raise ValueError("A row's log_probs, old_log_probs, advantages and keys must have one length.")
        if not rows:
            return cls([torch.empty(0)] * 3 + [torch.empty(0, dtype=torch.int64)], [])
        columns = zip(*((row.log_probs, row.old_log_probs, row.advantages, row.keys) for row in rows), strict=True)
        *parts, keys = (_joined(column) for column in columns)
        parts = [part.float() for part in parts]
        if not all(part.is_cpu for part in parts):
            parts = list(torch.stack(parts).cpu())  # one copy from the device for everything
        return cls([part.contiguous() for part in (*parts, keys.cpu())], lengths)

    @property
    def values(self) -> CovTokens:
        """The parts, as numpy sees them."""
        return CovTokens(*(part.numpy() for part in self.parts))

    def columns(self, places: np.ndarray) -> list[np.ndarray]:
        """What orders the tokens at ``places``: key, key of the row, position in it, advantage and log-prob."""
        lengths = np.array(self.lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        starts = (ends - lengths)[np.searchsorted(ends, places, side="right")]
        values = self.values
        keys = values.keys
        doubles = [column[places].astype(np.float64) for column in (values.advantages, values.log_probs)]
        return [keys[places], keys[starts], places - starts, *doubles]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).detach()


class _Means(NamedTuple):
    """Of the tokens of all ranks; 0 without tokens, NaN where one is not finite."""

    num_tokens: int
    advantage: float
    log_prob: float


def _means(tokens: _Tokens, gather: Gather, implementation: str) -> _Means:
    """Means over all ranks. Rows are added exactly: order has no effect."""
    values = tokens.values
    columns = (values.advantages, values.log_probs)
    own = row_sums(columns, tokens.lengths, implementation=implementation)
    parts = gather(np.vstack([tokens.lengths, own]))
    sums = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    lengths, advantages, log_probs = sums.tolist()
    count = int(sum(lengths))
    if count == 0:
        return _Means(0, 0.0, 0.0)
    if not np.isfinite(sums).all():  # a step that the trainer will skip: no covariance, no selection
        return _Means(count, math.nan, math.nan)
    return _Means(count, math.fsum(advantages) / count, math.fsum(log_probs) / count)


def _quantiles(covariance: np.ndarray, quantiles: tuple[float, float], gather: Gather) -> tuple[float, float]:
    """Quantiles of the covariances of all ranks, interpolated linearly; 0 for an empty set."""
    everything = np.concatenate(gather(covariance))
    if len(everything) == 0:
        return 0.0, 0.0
    lower, upper = np.quantile(everything, quantiles)
    return float(lower), float(upper)
