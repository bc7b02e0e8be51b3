"""Comparing training methods over seeds at an equal budget of generated tokens, from the records of their runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spear_megatron.evaluation.student import Interval, mean_interval, paired_interval

Record = Sequence[Mapping[str, Any]]
SUCCESS = "val/success_rate"
TOKENS = "perf/response_tokens"
MIN_SEEDS = 3
"""Fewer seeds show no difference, whatever their interval."""


@dataclass(frozen=True, slots=True)
class TokenCurve:
    """A metric against the tokens that a run had generated: ``tokens`` ascending, one value each."""

    tokens: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def reach(self) -> float:
        """Tokens of the last value; 0 without any."""
        return self.tokens[-1] if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run of the study."""

    arm: str
    seed: int
    record: Record


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A figure that shows whether a part of the method did anything.

    ``reduce`` makes one number of the values up to the budget.
    """

    name: str
    metric: str
    reduce: Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arm: per seed success at the budget and area under the curve, and what its mechanisms did.

    ``final`` and ``area`` are by seed; ``mechanisms`` holds an interval per name, None where no run records it.
    """

    arm: str
    final: Mapping[int, float]
    area: Mapping[int, float]
    mechanisms: Mapping[str, Interval | None]


def _last_fifth(values: Sequence[float]) -> float:
    tail = values[-max(1, len(values) // 5) :]
    return math.fsum(tail) / len(tail)


MECHANISMS = (
    Mechanism("entropy (end)", "actor/entropy", _last_fifth),
    Mechanism("tool calls (end)", "tools/calls_mean", _last_fifth),
    Mechanism("bonus per trajectory (mean)", "reward/bonus_mean", lambda values: math.fsum(values) / len(values)),
    Mechanism("replayed trajectories", "replay/replayed", math.fsum),
    Mechanism("replay share of tokens (end)", "replay/token_share", _last_fifth),
    Mechanism("covariance tokens", "cov/selected", math.fsum),
    Mechanism("covariance tokens, replayed", "cov/replay_selected", math.fsum),
    Mechanism("groups dropped", "filter/groups_dropped", math.fsum),
)
"""The last fifth of the steps up to the budget is the end."""


def token_curve(record: Record, metric: str) -> TokenCurve:
    """``metric`` against all tokens sampled in training up to and including its step.

    ``perf/response_tokens`` counts every sampled token of a step, also those of trajectories that a filter then drops.
    An evaluation follows the update of its step; evaluation tokens are not counted.
    """
    tokens, total = [], 0.0
    values = []
    for line in record:
        total += float(line.get(TOKENS) or 0.0)
        value = line.get(metric)
        if value is not None:
            tokens.append(total)
            values.append(float(value))
    return TokenCurve(tuple(tokens), tuple(values))


def value_at(curve: TokenCurve, tokens: float) -> float:
    """Linear interpolation of the curve; evaluations in which no token was sampled in between count as one, the last.

    Raises:
        ValueError: the curve does not reach from its first value to ``tokens``.
    """
    if not curve.tokens or not curve.tokens[0] <= tokens <= curve.reach:
        reached = f"{curve.tokens[0]:.0f} to {curve.reach:.0f}" if curve.tokens else "no tokens at all"
        raise ValueError(f"the curve covers {reached}, not {tokens:.0f} tokens: lower the token budget")
    points = list(zip(curve.tokens, curve.values, strict=True))
    for (x0, y0), (x1, y1) in reversed(list(zip(points, points[1:]))):
        if x0 <= tokens <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
    return next(y for x, y in reversed(points) if x == tokens)


def area_under(curve: TokenCurve, budget: float) -> float:
    """Mean of the curve over the first ``budget`` tokens (trapezoids): high for a method that learns early.

    Raises:
        ValueError: the budget is not positive, or the curve does not start at 0 tokens and reach it.
    """
    if budget <= 0:
        raise ValueError(f"the token budget must be positive, got {budget}")
    points = [(0.0, value_at(curve, 0.0))]
    points += [(x, y) for x, y in zip(curve.tokens, curve.values, strict=True) if 0 < x < budget]
    points.append((budget, value_at(curve, budget)))
    areas = [(x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:])]
    return math.fsum(areas) / budget


def common_budget(runs: Sequence[Run]) -> float:
    """The largest token count up to which every run has been evaluated.

    Raises:
        ValueError: there are no runs, or one was never evaluated in training; it is named.
    """
    reaches = {(run.arm, run.seed): token_curve(run.record, SUCCESS).reach for run in runs}
    if not reaches:
        raise ValueError("there are no finished runs to compare")
    (arm, seed), least = min(reaches.items(), key=lambda item: item[1])
    if least <= 0:
        raise ValueError(f"run {arm} seed {seed} was never evaluated after a training step: set trainer.test_freq")
    return least


def outcomes(runs: Sequence[Run], budget: float, mechanisms: Sequence[Mechanism] = MECHANISMS) -> dict[str, Outcome]:
    """Every arm's figures at ``budget`` tokens, in the order in which the arms first occur.

    Raises:
        ValueError: a run does not reach the budget.
    """
    found: dict[str, Outcome] = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        curves = {run.seed: token_curve(run.record, SUCCESS) for run in own}
        found[arm] = Outcome(
            arm=arm,
            final={seed: value_at(curve, budget) for seed, curve in curves.items()},
            area={seed: area_under(curve, budget) for seed, curve in curves.items()},
            mechanisms={item.name: _mechanism(own, item, budget) for item in mechanisms},
        )
    return found


def _mechanism(runs: Sequence[Run], mechanism: Mechanism, budget: float) -> Interval | None:
    reduced = []
    for run in runs:
        curve = token_curve(run.record, mechanism.metric)
        values = [value for x, value in zip(curve.tokens, curve.values, strict=True) if 0 < x <= budget]
        if values:
            reduced.append(mechanism.reduce(values))
    return mean_interval(reduced) if reduced else None


def differences(
    found: Mapping[str, Outcome], baseline: str, confidence: float = 0.95
) -> dict[str, tuple[Interval, Interval]]:
    """Per other arm that shares a seed with ``baseline``: paired differences of success at the budget and of area."""
    if baseline not in found:
        return {}
    base, result = found[baseline], {}
    for arm, outcome in found.items():
        final = paired_interval(outcome.final, base.final, confidence)
        area = paired_interval(outcome.area, base.area, confidence)
        if arm != baseline and final is not None and area is not None:
            result[arm] = (final, area)
    return result


def verdict(interval: Interval) -> str:
    """What an interval of a difference shows: higher, lower, no difference shown, or too few seeds.

    Two seeds can agree by chance, which gives an interval of no width: they show nothing.
    """
    if interval.num < MIN_SEEDS:
        return "too few seeds"
    return {1: "higher", -1: "lower", 0: "no difference shown"}[interval.sign]


def band_on_grid(curves: Sequence[TokenCurve], budget: float, num_points: int = 41) -> list[tuple[float, Interval]]:
    """Mean and t interval of several curves at equally spaced token counts from 0 to ``budget``."""
    grid = [budget * index / (num_points - 1) for index in range(num_points)]
    return [(x, mean_interval([value_at(curve, x) for curve in curves])) for x in grid]
