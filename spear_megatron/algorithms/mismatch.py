"""How far the engine's log-probs of the sampled tokens are from the trainer's, in total and by where the tokens stand.

Both should compute log p(token | context) with the same weights. Where they do not, the policy gradient is that of
another policy than the one that acted (F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training", 2025). Only tokens sampled by the current weights can drift; those of older versions differ because the
weights moved, and are told apart.

Sums are kept without rounding error (:class:`Sums`), so that figures of the same log-probs are the same bits whatever
the layout, the packing or the order of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

LOG_RATIO_LIMIT = 20.0
DIFFERENCE_LIMIT = 1000.0
"""What a difference counts as that is not finite, in nats: figures stay finite, and far above any bound."""

TURNS = (*map(str, range(1, 9)), "9plus")
POSITIONS = ("1", *(f"{1 << k}-{(2 << k) - 1}" for k in range(1, 15)), "32768plus")
LAGS = ("0", "1", "2", "3plus")
BUCKETS = (
    "all", *(f"turn_{name}" for name in TURNS), *(f"position_{name}" for name in POSITIONS),
    *(f"lag_{name}" for name in LAGS),
)  # fmt: skip
"""``all``, the turns and the positions hold tokens of the current weights; the lags hold every token."""

_KINDS = 4  # every token counts in total, by turn, by position and by lag
_FIRST_TURN, _FIRST_POSITION, _FIRST_LAG = 1, 1 + len(TURNS), 1 + len(TURNS) + len(POSITIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogProbs:
    """The two log-probs of one segment's tokens.

    Attributes:
        log_probs, rollout_log_probs: float32 [n], of trainer and engine.
        mask: bool [n], the sampled tokens.
        policy_versions: int32 [n], version of the weights that sampled the token; None: the current one.
        first_turn: 1-based turn of the segment's first sampled token within its trajectory.
    """

    log_probs: torch.Tensor
    rollout_log_probs: torch.Tensor
    mask: torch.Tensor
    policy_versions: torch.Tensor | None = None
    first_turn: int = 1


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of one bucket's tokens. Those of floats are exact: unevaluated sums of floats, see :func:`exact_sum`."""

    tokens: int = 0
    over_bound: int = 0
    abs_diff: tuple[float, ...] = ()
    k3: tuple[float, ...] = ()
    ratio: tuple[float, ...] = ()
    abs_diff_max: float = 0.0
    ratio_max: float = 0.0


@dataclass(frozen=True, slots=True)
class BucketFigures:
    """Figures of one bucket with d = trainer's minus engine's log-prob.

    Attributes:
        tokens: how many. over_bound: share of tokens with |d| above the token bound.
        abs_diff_mean, abs_diff_max: of |d|, nats.
        k3: KL(engine || trainer) per token by the k3 estimator, exp(d) - 1 - d, nats.
        ratio_mean, ratio_max: of exp(d); d is limited to [-20, 20] here and in k3.
    """

    tokens: int
    abs_diff_mean: float
    abs_diff_max: float
    k3: float
    ratio_mean: float
    ratio_max: float
    over_bound: float


Mismatch = Mapping[str, BucketFigures]
"""Figures of the buckets that have tokens, by names of :data:`BUCKETS`, in their order; ``all`` is always there."""


def num_turns(mask: torch.Tensor) -> int:
    """Runs of sampled tokens in ``mask``, bool [n]."""
    return int(_run_starts(mask).sum())


def turn_numbers(mask: torch.Tensor, first_turn: int = 1) -> torch.Tensor:
    """Turn of every sampled token, int64 [n], 0 off the mask.

    A turn is a run of sampled tokens: what the environment inserts lies between two of them.

    Args:
        mask: bool [n]. first_turn: number of the first run.
    """
    return torch.where(mask, _run_starts(mask).long().cumsum(0) + (first_turn - 1), 0)


def _run_starts(mask: torch.Tensor) -> torch.Tensor:
    return mask & ~torch.nn.functional.pad(mask, (1, 0))[: len(mask)]


def response_positions(mask: torch.Tensor) -> torch.Tensor:
    """1-based place of every sampled token after the segment's prompt, inserted tokens counted; int64 [n], 0 off mask.

    Args:
        mask: bool [n]; its first True is position 1.
    """
    after_prompt = mask.long().cumsum(0) > 0
    return torch.where(mask, after_prompt.long().cumsum(0), 0)


def version_lags(mask: torch.Tensor, policy_versions: torch.Tensor | None, current: int) -> torch.Tensor:
    """Versions between the weights that sampled a token and ``current``; int64 [n], 0 off the mask and where unknown.

    Args:
        policy_versions: int32 [n], negative where unknown; None knows none. A newer one than ``current`` has lag 0.
    """
    if policy_versions is None:
        return torch.zeros(len(mask), dtype=torch.int64)
    versions = policy_versions.long()
    return torch.where(mask & (versions >= 0), (current - versions).clamp(min=0), 0)


def exact_sum(values: Iterable[float]) -> tuple[float, ...]:
    """The sum of finite ``values`` as floats whose unevaluated sum is exact, the largest first; empty for 0.

    J. R. Shewchuk, "Adaptive Precision Floating-Point Arithmetic" (1997). ``math.fsum`` of the result, and of several
    results together, is the correctly rounded sum: it depends on no order and on no grouping.
    """
    rest, parts = list(values), list[float]()
    while (part := math.fsum(rest)) != 0.0:
        parts.append(part)
        rest.append(-part)
    return tuple(parts)


def row_differences(row: RowLogProbs) -> tuple[torch.Tensor, torch.Tensor]:
    """(|d|, d limited to [-20, 20]) of the sampled tokens, float64 [m]; one that is not a number counts as the limit.

    |d| of a difference that is not finite, or is beyond it, is :data:`DIFFERENCE_LIMIT`.
    """
    difference = row.log_probs.detach().double()[row.mask] - row.rollout_log_probs.double()[row.mask]
    bad = difference.isnan()
    size = torch.where(bad, DIFFERENCE_LIMIT, difference.abs()).clamp(max=DIFFERENCE_LIMIT)
    return size, torch.where(bad, LOG_RATIO_LIMIT, difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def measure_rows(rows: Sequence[RowLogProbs], *, version: int, token_bound: float) -> dict[str, Sums]:
    """Sums of every bucket that has tokens of these rows.

    Args:
        version: of the weights behind ``log_probs``. token_bound: see :attr:`BucketFigures.over_bound`.
    """
    sums, maxima = [], []
    for row in rows:
        size, limited = row_differences(row)
        ratio = limited.exp()
        columns = _bucket_indices(row, version)
        values = torch.stack([torch.ones_like(size), (size > token_bound).double(), size, _k3(limited), ratio])
        # One extra column takes what is in no bucket.
        added = torch.zeros(len(BUCKETS) + 1, len(values), dtype=torch.float64)
        sums.append(added.index_add_(0, columns, values.T.repeat(_KINDS, 1))[:-1])
        places = columns.unsqueeze(1).expand(-1, 2)
        largest = torch.stack([size, ratio], 1).repeat(_KINDS, 1)
        maxima.append(torch.zeros(len(BUCKETS) + 1, 2, dtype=torch.float64).scatter_reduce_(0, places, largest, "amax"))
    if not rows:
        return {}
    by_row, largest = torch.stack(sums), torch.stack(maxima).amax(0)
    filled = by_row[:, :, 0].sum(0).nonzero().flatten().tolist()
    return {BUCKETS[column]: _column_sums(by_row[:, column].T.tolist(), largest[column].tolist()) for column in filled}


def _k3(difference: torch.Tensor) -> torch.Tensor:
    # exp(d) - 1 as one function: of the tiny differences of an honest engine little else would be left.
    return torch.expm1(difference) - difference


def _bucket_indices(row: RowLogProbs, version: int) -> torch.Tensor:
    """Indices into :data:`BUCKETS` of the sampled tokens in total, by turn, position and lag; int64 [4 m].

    A token of an older version has the index behind the last in all but its lag.
    """
    mask, nowhere = row.mask, len(BUCKETS)
    lag = version_lags(mask, row.policy_versions, version)[mask]
    current = lag == 0
    turn = turn_numbers(mask, row.first_turn)[mask].clamp(max=len(TURNS))
    # frexp(x) of an integer x below 2^53 has the exponent of the next power of two above it, without rounding.
    power = torch.frexp(response_positions(mask)[mask].double())[1].long() - 1
    return torch.cat(
        [
            torch.where(current, 0, nowhere),
            torch.where(current, _FIRST_TURN + turn - 1, nowhere),
            torch.where(current, _FIRST_POSITION + power.clamp(max=len(POSITIONS) - 1), nowhere),
            _FIRST_LAG + lag.clamp(max=len(LAGS) - 1),
        ]
    )


def _column_sums(by_row: Sequence[Sequence[float]], largest: Sequence[float]) -> Sums:
    tokens, over, size, k3, ratio = by_row
    return Sums(int(sum(tokens)), int(sum(over)), exact_sum(size), exact_sum(k3), exact_sum(ratio), *largest)


def merge_sums(parts: Iterable[Mapping[str, Sums]]) -> dict[str, Sums]:
    """Sums of several ranks as one, in the order of :data:`BUCKETS`."""
    merged: dict[str, Sums] = {}
    for part in parts:
        for name, sums in part.items():
            merged[name] = _added(merged[name], sums) if name in merged else sums
    return {name: merged[name] for name in BUCKETS if name in merged}


def _added(one: Sums, other: Sums) -> Sums:
    return Sums(
        one.tokens + other.tokens,
        one.over_bound + other.over_bound,
        exact_sum((*one.abs_diff, *other.abs_diff)),
        exact_sum((*one.k3, *other.k3)),
        exact_sum((*one.ratio, *other.ratio)),
        max(one.abs_diff_max, other.abs_diff_max),
        max(one.ratio_max, other.ratio_max),
    )


def measure(
    rows: Sequence[RowLogProbs],
    *,
    version: int,
    token_bound: float,
    gather: Callable[[dict[str, Sums]], Sequence[Mapping[str, Sums]]] = lambda own: [own],
) -> Mismatch:
    """Figures of all ranks' rows.

    Args:
        rows: this rank's. version, token_bound: as in :func:`measure_rows`.
        gather: this rank's sums -> those of every rank whose rows count, the same on all.
    """
    total = {"all": Sums()} | merge_sums(gather(measure_rows(rows, version=version, token_bound=token_bound)))
    return {name: _figures(sums) for name, sums in total.items()}


def _figures(sums: Sums) -> BucketFigures:
    count = max(sums.tokens, 1)
    return BucketFigures(
        tokens=sums.tokens,
        abs_diff_mean=math.fsum(sums.abs_diff) / count,
        abs_diff_max=sums.abs_diff_max,
        k3=math.fsum(sums.k3) / count,
        ratio_mean=math.fsum(sums.ratio) / count if sums.tokens else 1.0,
        ratio_max=sums.ratio_max if sums.tokens else 1.0,
        over_bound=sums.over_bound / count,
    )


def sequence_sum(row: RowLogProbs, *, version: int, kind: str) -> tuple[int, float]:
    """(tokens, sum) over a segment's tokens of the current weights, of |d| or of k3.

    Args:
        version: as in :func:`measure_rows`. kind: ``abs_diff`` or ``k3``.

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind not in ("abs_diff", "k3"):
        raise ValueError(f"kind is {kind!r}; use abs_diff or k3.")
    current = version_lags(row.mask, row.policy_versions, version)[row.mask] == 0
    size, limited = row_differences(row)
    values = size if kind == "abs_diff" else _k3(limited)
    return int(current.sum()), float(values[current].sum())


def sequence_mean(parts: Sequence[tuple[int, float]]) -> float:
    """Mean over all segments of a trajectory, from :func:`sequence_sum` of each in any order; 0 without a token."""
    count = sum(tokens for tokens, _ in parts)
    return math.fsum(value for _, value in parts) / count if count else 0.0


def worst_bucket(mismatch: Mismatch, kind: str) -> str | None:
    """Name of the ``kind`` (turn, position or lag) of largest mean |d|; None where none has tokens.

    Buckets below a hundredth of all tokens are passed over: a single token far out says little.
    """
    found = {name: value for name, value in mismatch.items() if name.startswith(f"{kind}_")}
    least = sum(value.tokens for value in found.values()) / 100
    large = [name for name, value in found.items() if value.tokens >= least]
    return max(large, key=lambda name: found[name].abs_diff_mean) if large else None
