"""The local part of a selection by covariance: candidates, and those of them that can be among the k smallest.

Exact and the same bit for bit in both implementations, so that what is selected depends on neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from spear_megatron.kernels.extension import compiled_module, missing_reason, warn_slow_path
from spear_megatron.kernels.backends import IMPLEMENTATIONS
from spear_megatron.parallel.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOG_RATIO_LIMIT = 20.0
NEAR_BOUND = 1e-5
_SUM_LANES = 16
_SUM_BLOCK = 4096
_WORD = (1 << 64) - 1


class CovTokens(NamedTuple):
    """Tokens of a selection: float32 [T] contiguous, keys int64 [T]."""

    log_probs: NDArray[np.float32]
    old_log_probs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    keys: NDArray[np.int64]


class CovJudge(NamedTuple):
    """Which tokens are candidates: covariance inside (lb, ub), not NaN, and not clipped by PPO.

    Attributes:
        mean_advantage, mean_log_prob: the covariance is (A - mean A)(logp - mean logp), in double.
        lb, ub: exclusive bounds, may be infinite.
        clip_ratio_low, clip_ratio_high: PPO clip range; 1 and infinity clip nothing.
    """

    mean_advantage: float
    mean_log_prob: float
    lb: float = -math.inf
    ub: float = math.inf
    clip_ratio_low: float = 1.0
    clip_ratio_high: float = math.inf

    def log_bounds(self) -> tuple[float, float]:
        """Log-ratios below the first or above the second are out of the clip range; infinite where none can be."""
        lower = math.log1p(-self.clip_ratio_low) if self.clip_ratio_low < 1 else -math.inf
        upper = math.log1p(self.clip_ratio_high)
        # Log-ratios are limited, so bounds beyond the limit are never crossed.
        return (
            lower if lower > -_LOG_RATIO_LIMIT else -math.inf,
            upper if upper < _LOG_RATIO_LIMIT else math.inf,
        )


class Candidates(NamedTuple):
    """What :func:`cov_candidates` finds.

    Attributes:
        num_candidates: how many there are.
        num_near_bound: tokens (candidates or not) whose covariance is within 1e-5 of lb or ub.
        places: int64, ascending; the k candidates that come first, and all that tie with the last of them.
    """

    num_candidates: int
    num_near_bound: int
    places: NDArray[np.int64]


class Chosen(NamedTuple):
    """What :func:`cov_chosen` finds.

    Attributes:
        num_candidates, num_near_bound: as in :class:`Candidates`.
        num_chosen: tokens of the mask: min(k, candidates), or more where some tie with the k-th.
        mask: bool [T].
    """

    num_candidates: int
    num_near_bound: int
    num_chosen: int
    mask: torch.Tensor


def cov_chosen(
    tokens: CovTokens, judge: CovJudge, k: int, *, by_covariance: bool = False, isa: str = "auto"
) -> Chosen:
    """The ``k`` candidates that come first, and all that tie with the last of them, by the compiled kernel.

    For tokens that lie on one rank; arguments and errors as in :func:`cov_candidates`.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    mask = torch.empty(len(tokens.keys), dtype=torch.bool)
    num_candidates, num_near_bound, num_chosen = compiled_module().cov_choose(
        log_probs=tokens.log_probs.ctypes.data,
        old_log_probs=tokens.old_log_probs.ctypes.data,
        advantages=tokens.advantages.ctypes.data,
        keys=tokens.keys.ctypes.data,
        tokens=len(tokens.keys),
        mean_advantage=judge.mean_advantage,
        mean_log_prob=judge.mean_log_prob,
        bounds=(judge.lb, judge.ub),
        nearness=NEAR_BOUND,
        clip_bounds=judge.log_bounds(),
        by_covariance=by_covariance,
        k=k,
        chosen=mask.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return Chosen(num_candidates, num_near_bound, num_chosen, mask)


class SelectedHere(NamedTuple):
    """What :func:`cov_selected` finds.

    Attributes:
        k: max(floor(ratio * tokens), 1).
        mean_advantage, mean_log_prob: of the tokens; both NaN where a value is not finite.
        num_candidates, num_near_bound, num_chosen, mask: as in :class:`Chosen`.
    """

    k: int
    mean_advantage: float
    mean_log_prob: float
    num_candidates: int
    num_near_bound: int
    num_chosen: int
    mask: torch.Tensor


def cov_selected(
    columns: Sequence[torch.Tensor],
    lengths: list[int],
    ratio: float,
    judge: CovJudge,
    *,
    by_covariance: bool = False,
    isa: str = "auto",
) -> SelectedHere:
    """Means, k and choice of a whole selection in one call of the compiled kernel, for tokens that lie on one rank.

    Args:
        columns: log-probs, old log-probs, advantages (float32 [T]) and keys (int64 [T]); contiguous, on the host.
        lengths: of the rows that lie back to back; T is their sum, at least 1.
        ratio: above 0.
        judge: bounds and clips; its means are not used.
        by_covariance, isa: see :func:`cov_candidates`.
    """
    log_probs, old_log_probs, advantages, keys = columns
    mask = torch.empty(len(keys), dtype=torch.bool)
    k, mean_advantage, mean_log_prob, *counts = compiled_module().cov_select(
        log_probs=log_probs.data_ptr(),
        old_log_probs=old_log_probs.data_ptr(),
        advantages=advantages.data_ptr(),
        keys=keys.data_ptr(),
        lengths=lengths,
        ratio=ratio,
        bounds=(judge.lb, judge.ub),
        nearness=NEAR_BOUND,
        clip_bounds=judge.log_bounds(),
        by_covariance=by_covariance,
        chosen=mask.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    num_candidates, num_near_bound, num_chosen = counts
    return SelectedHere(k, mean_advantage, mean_log_prob, num_candidates, num_near_bound, num_chosen, mask)


def cov_candidates(
    tokens: CovTokens,
    judge: CovJudge,
    k: int,
    *,
    by_covariance: bool = False,
    implementation: str = "auto",
    isa: str = "auto",
) -> Candidates:
    """Candidates by ``judge`` and the places of those that can be among the ``k`` first.

    Args:
        tokens: the tokens of this rank.
        judge: which are candidates.
        k: at least 1.
        by_covariance: the largest covariance comes first; False: the smallest key.
        implementation: "auto" (compiled, or numpy with one warning if it is not built), "compiled" or "eager" (numpy).
        isa: of the compiled kernel: "auto", generic, avx2 or avx512.

    Raises:
        ValueError: unknown implementation or ``k`` below 1.
        RunError: ``implementation="compiled"`` and the compiled kernels are missing.
    """
    if not use_compiled(implementation):
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        return _eager_candidates(tokens, judge, k, by_covariance)
    found = cov_chosen(tokens, judge, k, by_covariance=by_covariance, isa=isa)
    return Candidates(found.num_candidates, found.num_near_bound, np.flatnonzero(found.mask.numpy()))


def covariances(tokens: CovTokens, mean_advantage: float, mean_log_prob: float) -> NDArray[np.float64]:
    """(A - mean A)(logp - mean logp) of every token, float64 [T]."""
    with np.errstate(invalid="ignore", over="ignore"):
        return (tokens.advantages.astype(np.float64) - mean_advantage) * (
            tokens.log_probs.astype(np.float64) - mean_log_prob
        )


def row_sums(
    columns: Sequence[NDArray[np.float32]], lengths: list[int], *, implementation: str = "auto", isa: str = "auto"
) -> NDArray[np.float64]:
    """Sums in double of rows that lie back to back, each in an order given by its length alone: any layout agrees.

    In every block of 4096 values of a row, value i goes to sum i mod 16 of 16, in order; these are then folded in
    halves, and the blocks are added in order.

    Args:
        columns: each float32 [sum of lengths], contiguous.
        lengths: of the rows.
        implementation, isa: see :func:`cov_candidates`.

    Returns:
        float64 [columns, rows].
    """
    sums = np.zeros((len(columns), len(lengths)), dtype=np.float64)
    if use_compiled(implementation):
        sizes = np.array(lengths, dtype=np.int64)
        compiled_module().row_sums(
            columns=[column.ctypes.data for column in columns],
            lengths=sizes.ctypes.data,
            rows=len(sizes),
            sums=sums.ctypes.data,
            threads=torch.get_num_threads(),
            isa=isa,
        )
        return sums
    for column, values in enumerate(columns):
        start = 0
        for row, length in enumerate(lengths):
            for first in range(start, start + length, _SUM_BLOCK):
                sums[column, row] += _lane_sum(values[first : min(first + _SUM_BLOCK, start + length)])
            start += length
    return sums


def _lane_sum(values: NDArray[np.float32]) -> float:
    padded = np.zeros(len(values) + -len(values) % _SUM_LANES, dtype=np.float64)
    padded[: len(values)] = values
    with np.errstate(invalid="ignore"):
        # Along the first axis numpy adds one group of 16 after the other.
        lanes = np.add.reduce(padded.reshape(-1, _SUM_LANES), axis=0, initial=0.0)
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def token_keys(base: int, count: int, implementation: str = "auto") -> torch.Tensor:
    """Keys of the positions 0 to ``count`` - 1 of a row: splitmix64 (Steele et al. 2014) of base + position.

    Args:
        base: 64-bit key of what the row is (seed, step, update, trajectory, segment), never of where it is.
        count: length of the row.
        implementation: see :func:`cov_candidates`.

    Returns:
        int64 [count], distinct.
    """
    if use_compiled(implementation):
        keys = torch.empty(count, dtype=torch.int64)
        compiled_module().token_keys(base=base & _WORD, count=count, keys=keys.data_ptr())
        return keys
    word = np.arange(count, dtype=np.uint64) + np.uint64((base + 0x9E3779B97F4A7C15) & _WORD)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((word ^ (word >> np.uint64(31))).view(np.int64))


def use_compiled(implementation: str) -> bool:
    """Whether ``implementation`` means the compiled kernels here; arguments and errors as in :func:`cov_candidates`."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "eager":
        return False
    unfit = missing_reason()
    if unfit and implementation == "compiled":
        raise RunError(unfit)
    if unfit:
        warn_slow_path(unfit)
    return not unfit


def _eager_candidates(tokens: CovTokens, judge: CovJudge, k: int, by_covariance: bool) -> Candidates:
    covariance = covariances(tokens, judge.mean_advantage, judge.mean_log_prob)
    near = np.zeros(len(covariance), dtype=bool)
    for bound in (judge.lb, judge.ub):
        near |= (covariance >= bound - NEAR_BOUND) & (covariance <= bound + NEAR_BOUND)
    inside = (covariance > judge.lb) & (covariance < judge.ub)
    places = np.flatnonzero(inside & ~_ppo_clipped(tokens, judge))
    count = len(places)
    if count > k:
        order = -covariance[places] if by_covariance else tokens.keys[places]
        places = places[order <= np.partition(order, k - 1)[k - 1]]
    return Candidates(count, int(near.sum()), places)


def _ppo_clipped(tokens: CovTokens, judge: CovJudge) -> NDArray[np.bool_]:
    """Where clip(r) A < r A. Compared as logarithms: an exponential's last bit may depend on the array around it."""
    with np.errstate(invalid="ignore"):
        log_ratio = (tokens.log_probs - tokens.old_log_probs).astype(np.float64)
    lower, upper = judge.log_bounds()
    clipped: NDArray[np.bool_] = ((tokens.advantages > 0) & (log_ratio > upper)) | (
        (tokens.advantages < 0) & (log_ratio < lower)
    )
    return clipped
