"""Comparison of arms at equal tokens, on made-up records with known differences."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
from spear_megatron.evaluation.student import Interval
from spear_megatron.evaluation.study import (
    Mechanism,
    Run,
    TokenCurve,
    area_under,
    band_on_grid,
    common_budget,
    differences,
    outcomes,
    token_curve,
    value_at,
    verdict,
)


def record(tokens_per_step: float, success: list[float], every: int = 2, **metrics: float) -> list[dict[str, Any]]:
    """Lines with an evaluation at step 0 and then every ``every`` steps."""
    lines: list[dict[str, Any]] = [{"step": 0, "val/success_rate": success[0]}]
    for step in range(1, every * (len(success) - 1) + 1):
        line: dict[str, Any] = {"step": step, "perf/response_tokens": tokens_per_step, **metrics}
        if step % every == 0:
            line["val/success_rate"] = success[step // every]
        lines.append(line)
    return lines


def test_tokens_of_a_curve_are_those_sampled_so_far() -> None:
    curve = token_curve(record(100.0, [0.1, 0.3, 0.4]), "val/success_rate")
    assert curve == TokenCurve((0.0, 200.0, 400.0), (0.1, 0.3, 0.4)) and curve.reach == 400.0
    curve = token_curve([{"step": 1, "perf/response_tokens": 5.0, "x": None}, {"step": 2, "x": 1.0}], "x")
    assert curve == TokenCurve((5.0,), (1.0,)), "a value that was not finite is no value"


def test_values_between_evaluations_are_interpolated() -> None:
    curve = TokenCurve((0.0, 200.0, 400.0), (0.1, 0.3, 0.4))
    assert [value_at(curve, x) for x in (0.0, 50.0, 200.0, 300.0, 400.0)] == pytest.approx([0.1, 0.15, 0.3, 0.35, 0.4])
    assert value_at(TokenCurve((0.0, 0.0, 10.0), (0.1, 0.2, 0.4)), 5.0) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="covers 0 to 400, not 401 tokens"):
        value_at(curve, 401.0)
    with pytest.raises(ValueError, match="no tokens at all"):
        value_at(TokenCurve((), ()), 0.0)


def test_area_equals_a_fine_sum() -> None:
    curve = TokenCurve((0.0, 200.0, 400.0, 1000.0), (0.1, 0.3, 0.2, 0.9))
    for budget in (100.0, 200.0, 730.0, 1000.0):
        steps = 20_000
        fine = sum(value_at(curve, (index + 0.5) * budget / steps) for index in range(steps)) / steps
        assert area_under(curve, budget) == pytest.approx(fine, abs=1e-6)
    with pytest.raises(ValueError, match="positive"):
        area_under(curve, 0.0)


def study(effect: float, num_seeds: int, rng: Random, noise: float = 0.05) -> list[Run]:
    """Arm ``b`` ends ``effect`` above ``a``; a seed's luck is shared by both, and ``b`` needs twice the tokens."""
    runs = []
    for seed in range(1, num_seeds + 1):
        luck = rng.gauss(0, 0.2)
        for arm, extra, cost in (("a", 0.0, 100.0), ("b", effect, 200.0)):
            end = 0.5 + luck + extra + rng.gauss(0, noise)
            levels = [0.0, end] if arm == "b" else [0.0, end, end]
            runs.append(Run(arm, seed, record(cost, levels)))
    return runs


def test_a_known_difference_is_found_and_paired() -> None:
    runs = study(0.3, 5, Random(3))
    budget = common_budget(runs)
    assert budget == 400.0
    found = outcomes(runs, budget, ())
    assert list(found) == ["a", "b"] and set(found["b"].final) == {1, 2, 3, 4, 5}
    (final, area) = differences(found, "a")["b"]
    assert final.low < 0.3 < final.high and verdict(final) == "higher"
    assert area.num == 5 and differences(found, "missing") == {}
    reverse, _ = differences(found, "b")["a"]
    assert verdict(reverse) == "lower" and reverse.mean == pytest.approx(-final.mean)


def test_without_a_difference_few_studies_claim_one() -> None:
    rng = Random(7)
    claims = 0
    for _ in range(400):
        found = outcomes(study(0.0, 5, rng), 400.0, ())
        claims += verdict(differences(found, "a")["b"][0]) != "no difference shown"
    assert 0.02 < claims / 400 < 0.09


def test_few_seeds_and_intervals_around_zero_show_nothing() -> None:
    assert verdict(Interval(0.5, math.nan, math.nan, 1)) == "too few seeds"
    assert verdict(Interval(0.5, 0.5, 0.5, 2)) == "too few seeds"
    assert verdict(Interval(0.5, -0.1, 1.1, 5)) == "no difference shown"
    assert verdict(Interval(-0.5, -0.9, -0.1, 5)) == "lower"


def test_mechanisms_are_counted_up_to_the_budget() -> None:
    calls = Mechanism("calls", "tools/calls_mean", math.fsum)
    absent = Mechanism("replayed", "replay/replayed", math.fsum)
    runs = [Run("a", seed, record(100.0, [0.0, 0.1, 0.2], **{"tools/calls_mean": float(seed)})) for seed in (1, 3)]
    found = outcomes(runs, 300.0, (calls, absent))["a"].mechanisms
    assert found["calls"] is not None and found["calls"].mean == 6.0, "three steps of 1 and of 3 calls"
    assert found["replayed"] is None


def test_budget_needs_evaluated_runs() -> None:
    with pytest.raises(ValueError, match="no finished runs"):
        common_budget([])
    runs = [Run("a", 1, record(100.0, [0.0, 0.1])), Run("b", 2, [{"step": 1, "perf/response_tokens": 5.0}])]
    with pytest.raises(ValueError, match="run b seed 2 was never evaluated"):
        common_budget(runs)


def test_bands_are_means_over_runs() -> None:
    curves = [TokenCurve((0.0, 100.0), (0.0, end)) for end in (0.2, 0.4)]
    band = band_on_grid(curves, 100.0, num_points=3)
    assert [x for x, _ in band] == [0.0, 50.0, 100.0]
    assert [part.mean for _, part in band] == pytest.approx([0.0, 0.15, 0.3])
