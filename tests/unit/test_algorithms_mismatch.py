"""Differences between engine and trainer: against plain Python, and the same bits in any order and grouping."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from spear_megatron.algorithms.mismatch import (
    BUCKETS, DIFFERENCE_LIMIT, BucketFigures, RowLogProbs, exact_sum, measure, measure_rows, num_turns,
    response_positions, sequence_mean, sequence_sum, turn_numbers, version_lags, worst_bucket,
)  # fmt: skip

VERSION, BOUND = 7, 0.25


def make_rows(count: int = 40, seed: int = 0, longest: int = 300) -> list[RowLogProbs]:
    """Ragged rows of several turns, versions 3 to 7, some without versions, one without a sampled token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        n = int(torch.randint(4, longest, (1,), generator=generator))
        mask = (torch.rand(n, generator=generator) < 0.15).cumsum(0) % 2 == 1
        mask[:2] = False
        if number == 3:
            mask[:] = False
        log_probs = -3 * torch.rand(n, generator=generator) * mask
        noise = 0.3 * torch.randn(n, generator=generator) * mask
        versions = torch.randint(3, VERSION + 1, (n,), generator=generator, dtype=torch.int32)
        versions[torch.rand(n, generator=generator) < 0.6] = VERSION
        rows.append(
            RowLogProbs(
                log_probs=log_probs, rollout_log_probs=log_probs + noise, mask=mask,
                policy_versions=torch.where(mask, versions, -1) if number % 5 else None, first_turn=1 + number % 3,
            )  # fmt: skip
        )
    return rows


def position_name(position: int) -> str:
    power = min(int(math.log2(position)), 15)
    if power == 15:
        return "32768plus"
    return "1" if power == 0 else f"{2**power}-{2 ** (power + 1) - 1}"


def slow(rows: list[RowLogProbs]) -> dict[str, dict[str, float]]:
    """Every figure token by token."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        turn, position, before = row.first_turn - 1, 0, False
        for t in range(len(row.mask)):
            inside = bool(row.mask[t])
            turn += inside and not before
            position += inside or position > 0
            before = inside
            if not inside:
                continue
            d = float(row.log_probs[t]) - float(row.rollout_log_probs[t])
            lag = 0 if row.policy_versions is None else VERSION - int(row.policy_versions[t])
            names = [f"lag_{lag if lag < 3 else '3plus'}"]
            if lag == 0:
                names += ["all", f"turn_{turn if turn < 9 else '9plus'}", f"position_{position_name(position)}"]
            for name in names:
                seen.setdefault(name, []).append(d)
    return {
        name: {
            "tokens": len(values), "abs_diff_mean": sum(map(abs, values)) / len(values),
            "abs_diff_max": max(map(abs, values)), "k3": sum(math.exp(d) - 1 - d for d in values) / len(values),
            "ratio_mean": sum(map(math.exp, values)) / len(values), "ratio_max": max(map(math.exp, values)),
            "over_bound": sum(abs(d) > BOUND for d in values) / len(values),
        }
        for name, values in seen.items()
    }  # fmt: skip


def as_dict(figures: BucketFigures) -> dict[str, float]:
    return {name: getattr(figures, name) for name in BucketFigures.__dataclass_fields__}


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_those_of_a_token_by_token_reference(seed: int) -> None:
    rows = make_rows(seed=seed)
    result, expected = measure(rows, version=VERSION, token_bound=BOUND), slow(rows)
    assert list(result) == [name for name in BUCKETS if name in expected]
    assert {"turn_1", "turn_9plus", "lag_0", "lag_3plus", "position_1", "position_64-127"} <= result.keys()
    for name, figures in expected.items():
        assert as_dict(result[name]) == pytest.approx(figures, rel=1e-12), name


def test_positions_of_long_responses() -> None:
    mask = torch.ones(70000, dtype=torch.bool)
    mask[0] = False
    zeros = torch.zeros(70000)
    result = measure([RowLogProbs(log_probs=zeros, rollout_log_probs=zeros, mask=mask)], version=0, token_bound=BOUND)
    counts = {name.removeprefix("position_"): f.tokens for name, f in result.items() if name.startswith("position_")}
    assert counts["1"] == 1 and counts["2-3"] == 2 and counts["16384-32767"] == 16384
    assert counts["32768plus"] == 69999 - 32767 and sum(counts.values()) == 69999


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_the_same_bits_in_any_order_and_on_any_number_of_ranks(num_ranks: int) -> None:
    rows = make_rows()
    expected = measure(rows, version=VERSION, token_bound=BOUND)
    shuffled = random.Random(num_ranks).sample(rows, len(rows))
    shares = [shuffled[rank::num_ranks] for rank in range(num_ranks)]
    parts = [measure_rows(share, version=VERSION, token_bound=BOUND) for share in shares]
    result = measure([], version=VERSION, token_bound=BOUND, gather=lambda own: [own, *reversed(parts)])
    assert result == expected


def test_sums_are_exact() -> None:
    draw = random.Random(3)
    values = [draw.choice((-1, 1)) * draw.random() * 10.0 ** draw.randint(-12, 12) for _ in range(500)]
    assert sum(map(Fraction, exact_sum(values))) == sum(map(Fraction, values))
    halves = exact_sum(values[:250]), exact_sum(values[250:])
    assert sum(map(Fraction, exact_sum((*halves[0], *halves[1])))) == sum(map(Fraction, values))
    assert exact_sum([]) == exact_sum([0.0, -0.0]) == exact_sum([1e300, -1e300]) == ()


def test_k3_of_tiny_differences_is_not_rounding_noise() -> None:
    mask = torch.tensor([False, True])
    row = RowLogProbs(log_probs=torch.tensor([0.0, 1e-7]), rollout_log_probs=torch.zeros(2), mask=mask)
    difference = float(torch.tensor(1e-7))
    expected = difference**2 / 2 + difference**3 / 6
    assert measure([row], version=0, token_bound=BOUND)["all"].k3 == pytest.approx(expected, rel=1e-8)
    assert sequence_sum(row, version=0, kind="k3") == (1, pytest.approx(expected, rel=1e-8))


def test_nothing_to_measure() -> None:
    figures = measure([], version=0, token_bound=BOUND)
    assert list(figures) == ["all"] and figures["all"] == BucketFigures(0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    assert worst_bucket(figures, "turn") is None


def test_turns_positions_and_lags() -> None:
    mask = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    assert turn_numbers(mask).tolist() == [0, 0, 1, 1, 0, 2, 0, 0, 3] and num_turns(mask) == 3
    assert turn_numbers(mask, 4).tolist() == [0, 0, 4, 4, 0, 5, 0, 0, 6]
    assert response_positions(mask).tolist() == [0, 0, 1, 2, 0, 4, 0, 0, 7]
    versions = torch.tensor([-1, -1, 5, 4, -1, 1, -1, -1, 9], dtype=torch.int32)
    assert version_lags(mask, versions, 5).tolist() == [0, 0, 0, 1, 0, 4, 0, 0, 0]
    assert num_turns(torch.zeros(0, dtype=torch.bool)) == 0


def test_differences_that_are_no_numbers_count_as_large() -> None:
    mask = torch.tensor([False, True, True, True])
    bad = torch.tensor([0.0, float("nan"), -float("inf"), -1.0])
    row = RowLogProbs(log_probs=bad, rollout_log_probs=torch.tensor([0.0, -1.0, -1.0, -1.0]), mask=mask)
    figures = measure([row], version=0, token_bound=BOUND)["all"]
    assert figures.abs_diff_max == DIFFERENCE_LIMIT and figures.abs_diff_mean == pytest.approx(2 * DIFFERENCE_LIMIT / 3)
    assert figures.over_bound == pytest.approx(2 / 3) and math.isfinite(figures.k3) and math.isfinite(figures.ratio_max)


def test_sequence_means_are_over_all_segments_and_the_current_weights() -> None:
    rows = make_rows(6)
    for kind, term in (("abs_diff", abs), ("k3", lambda d: math.exp(d) - 1 - d)):
        values = []
        for row in rows:
            for t in row.mask.nonzero().flatten().tolist():
                if row.policy_versions is None or int(row.policy_versions[t]) == VERSION:
                    values.append(term(float(row.log_probs[t]) - float(row.rollout_log_probs[t])))
        parts = [sequence_sum(row, version=VERSION, kind=kind) for row in rows]
        assert sequence_mean(parts) == pytest.approx(sum(values) / len(values), rel=1e-12)
        assert sequence_mean(parts[::-1]) == sequence_mean(parts)
    assert sequence_mean([]) == 0.0
    with pytest.raises(ValueError, match="abs_diff or k3"):
        sequence_sum(rows[0], version=VERSION, kind="k1")


def test_the_worst_bucket_is_not_one_of_a_few_tokens() -> None:
    def figures(tokens: int, mean: float) -> BucketFigures:
        return BucketFigures(tokens, mean, mean, 0.0, 1.0, 1.0, 0.0)

    mismatch = {"all": figures(1001, 0.1), "turn_1": figures(600, 0.1), "turn_2": figures(400, 0.4),
                "turn_3": figures(1, 5.0), "lag_0": figures(1001, 0.1)}  # fmt: skip
    assert worst_bucket(mismatch, "turn") == "turn_2" and worst_bucket(mismatch, "lag") == "lag_0"
    assert worst_bucket(mismatch, "position") is None
