"""The compiled selection by covariance is the eager one, token for token; its draw is exact and uniform."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron import _C
from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, TokenSet, select_tokens
from spear_megatron.kernels.cov_select import Candidates, CovJudge, CovTokens, cov_candidates, row_sums, token_keys

SETS = ("generic", "avx2", "avx512")[: ("generic", "avx2", "avx512").index(_C.isa()) + 1]
EXTREMES = (-(2**63), 2**63 - 1, 0, -1, 1, 2**53, 2**42, -(2**31))

numbers = st.one_of(
    st.floats(-3, 3, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 3e38])
)
token = st.tuples(numbers, numbers, numbers, st.one_of(st.integers(-5, 5), st.sampled_from(EXTREMES)))
bounds = st.one_of(st.floats(-2, 2), st.sampled_from([-math.inf, math.inf, 0.0, 1.0, 1.00001, math.nan]))
clips = st.sampled_from([0.0, 0.2, 0.999999999, 1.0, 2.0, 1e9])


def columns(tokens: list[tuple[float, float, float, int]]) -> CovTokens:
    parts = list(zip(*tokens, strict=True)) if tokens else [()] * 4
    with np.errstate(over="ignore"):
        floats = [np.array(part, dtype=np.float32) for part in parts[:3]]
    return CovTokens(*floats, np.array(parts[3], dtype=np.int64))


def same(left: Candidates, right: Candidates) -> bool:
    return left[:2] == right[:2] and left.places.tolist() == right.places.tolist()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(token, max_size=60),
    st.tuples(st.floats(-2, 2), st.floats(-2, 2), bounds, bounds, clips, clips),
    st.integers(1, 70),
    st.booleans(),
)
def test_any_token_is_judged_alike(
    tokens: list[tuple[float, float, float, int]], judge: tuple[float, ...], k: int, by_covariance: bool
) -> None:
    held = columns(tokens)
    expected = cov_candidates(held, CovJudge(*judge), k, by_covariance=by_covariance, implementation="eager")
    for isa in SETS:
        found = cov_candidates(
            held, CovJudge(*judge), k, by_covariance=by_covariance, implementation="compiled", isa=isa
        )
        assert same(found, expected)


def random_tokens(count: int, seed: int) -> CovTokens:
    generator = np.random.default_rng(seed)
    log_probs = -3 * generator.random(count, dtype=np.float32)
    old = log_probs + np.float32(0.3) * generator.standard_normal(count, dtype=np.float32)
    advantages = generator.standard_normal(count, dtype=np.float32)
    return CovTokens(log_probs, old, advantages, token_keys(seed, count).numpy())


@pytest.mark.parametrize("count", [1, 7, 8, 9, 2047, 2048, 2049, 40_000])
@pytest.mark.parametrize("k", [1, 5, 300, 50_000])
@pytest.mark.parametrize("by_covariance", [False, True])
def test_exactly_the_k_first_of_many(count: int, k: int, by_covariance: bool) -> None:
    tokens = random_tokens(count, seed=count)
    judge = CovJudge(0.1, -1.5, 0.05, 1.0, 0.2, 0.28)
    found = cov_candidates(tokens, judge, k, by_covariance=by_covariance, implementation="compiled")
    assert same(found, cov_candidates(tokens, judge, k, by_covariance=by_covariance, implementation="eager"))
    everything = cov_candidates(tokens, judge, count, implementation="compiled").places
    order = tokens.keys[everything]
    if by_covariance:
        order = -(tokens.advantages[everything].astype(float) - 0.1) * (tokens.log_probs[everything] - -1.5)
    assert found.places.tolist() == sorted(everything[np.argsort(order, kind="stable")[:k]].tolist())
    assert len(found.places) == min(k, found.num_candidates) and found.num_candidates == len(everything)


def beside_an_empty_rank(own: Any) -> list[Any]:
    if isinstance(own, list):
        return [own, [column[:0] for column in own]]
    return [own, own[:, :0] if own.ndim == 2 else 0 * own]


def test_one_rank_and_several_choose_alike() -> None:
    """The kernel that chooses where one rank has all tokens, against the exchange between ranks."""
    tokens = [torch.from_numpy(column) for column in random_tokens(5000, seed=8)]
    rule = ClipCovRule(0.02, 0.05, 1.0, 0.2, 0.28)
    for chosen_by in (rule, KlCovRule(0.02)):
        alone = select_tokens([TokenSet(*tokens)], chosen_by)
        beside = select_tokens([TokenSet(*tokens)], chosen_by, beside_an_empty_rank)
        assert alone.num_selected == 100 and torch.equal(alone.masks[0], beside.masks[0])
        assert alone.num_near_bound == beside.num_near_bound and alone.num_candidates == beside.num_candidates


@pytest.mark.parametrize("low_bits", [1, 9, 10, 11, 20, 63])
def test_keys_that_differ_in_few_bits(low_bits: int) -> None:
    """Digits of the search that all keys share, up to its last one."""
    generator = np.random.default_rng(low_bits)
    tokens = random_tokens(3000, seed=1)
    keys = generator.integers(0, 2**low_bits, 3000, dtype=np.int64) + generator.choice([-(2**63), 0], 3000)
    judge = CovJudge(0.0, -1.5)
    for k in (1, 2, 1499, 1500, 1501, 2999, 3000):
        results = [
            cov_candidates(tokens._replace(keys=keys), judge, k, implementation=name) for name in ("compiled", "eager")
        ]
        assert same(*results)
        last = np.sort(keys)[k - 1]
        assert results[0].places.tolist() == np.flatnonzero(keys <= last).tolist()


def test_threads_do_not_matter() -> None:
    tokens, threads = random_tokens(100_000, seed=4), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(cov_candidates(tokens, CovJudge(0.0, -1.5, 0.1, 0.5, 0.2, 0.2), 400))
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], other) for other in results[1:])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 10**6))
def test_row_sums_are_bitwise_the_same(lengths: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal(sum(lengths)) * 10.0 ** generator.integers(-9, 9, sum(lengths))).astype("f4")
    expected = row_sums([values, -values], lengths, implementation="eager")
    exact = [math.fsum(part.tolist()) for part in np.split(values, np.cumsum(lengths))[:-1]]
    assert expected[0].tolist() == pytest.approx(exact, rel=1e-9, abs=1e-6)
    for isa in SETS:
        assert np.array_equal(row_sums([values, -values], lengths, implementation="compiled", isa=isa), expected)


def test_row_sums_of_long_rows_and_of_nan() -> None:
    values = random_tokens(100_003, seed=2).advantages
    sums = [row_sums([values], [3, 100_000], implementation=name) for name in ("compiled", "eager")]
    assert np.array_equal(*sums)
    values[5] = math.nan
    assert np.isnan(row_sums([values], [3, 100_000])[0]).tolist() == [False, True]


@pytest.mark.parametrize("base", [0, 1, 5, -3, 2**63, 2**64 - 2, 0x9E3779B97F4A7C15, 2**70 + 1])
def test_keys_are_the_same(base: int) -> None:
    assert torch.equal(token_keys(base, 1000, "compiled"), token_keys(base, 1000, "eager"))
    assert token_keys(base, 0, "compiled").dtype == torch.int64


RULES = (
    ClipCovRule(0.1, 0.05, 1.0, 0.2, 0.28),
    ClipCovRule(0.002, -math.inf, math.inf, 1.0, 1.0),
    ClipCovRule(0.05, 0.0, 0.0, 0.2, 0.28, quantiles=(0.6, 0.99)),
    KlCovRule(0.02),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=8), st.integers(0, 10**6), st.sampled_from(RULES))
def test_the_selection_is_the_eager_one(lengths: list[int], seed: int, rule: ClipCovRule | KlCovRule) -> None:
    rows = []
    for number, length in enumerate(lengths):
        values = [torch.from_numpy(part) for part in random_tokens(length, seed=seed + number)]
        values[2] = values[2][:1].expand(length) if number % 2 else values[2]
        rows.append(TokenSet(*values))
    compiled, eager = (select_tokens(rows, rule, implementation=name) for name in ("compiled", "eager"))
    assert all(torch.equal(a, b) for a, b in zip(compiled.masks, eager.masks, strict=True))
    names = ("num_candidates", "num_selected", "num_near_bound", "lb", "ub", "mean_advantage", "mean_log_prob")
    assert [getattr(compiled, name) for name in names] == [getattr(eager, name) for name in names]


def draws(num_draws: int, picks: int, candidates: int) -> np.ndarray:
    """bool [num_draws, candidates]: what the compiled draw takes, with another base of the keys each time."""
    taken = np.zeros((num_draws, candidates), dtype=bool)
    floats = np.zeros((3, candidates), dtype=np.float32)
    for number in range(num_draws):
        keys = token_keys(number * 1_000_003, candidates, "compiled").numpy()
        found = cov_candidates(CovTokens(*floats, keys), CovJudge(0.0, 0.0), picks, implementation="compiled")
        taken[number, found.places] = True
    return taken


def test_the_draw_is_uniform() -> None:
    """Inclusion counts by Pearson's chi-square, scaled for draws without replacement."""
    num_draws, picks, candidates = 4000, 10, 100
    taken = draws(num_draws, picks, candidates)
    assert (taken.sum(1) == picks).all()
    expected, share = num_draws * picks / candidates, picks / candidates
    statistic = float(((taken.sum(0) - expected) ** 2).sum() / (expected * (1 - share))) * (1 - 1 / candidates)
    assert abs(statistic - (candidates - 1)) < 5 * math.sqrt(2 * (candidates - 1))


def test_the_draw_is_distributed_as_a_random_permutation() -> None:
    """Counts of every subset of 2 among 6, against as many heads of torch.randperm (two-sample chi-square)."""
    num_draws, generator = 4000, torch.Generator().manual_seed(0)
    subsets = {pair: number for number, pair in enumerate(itertools.combinations(range(6), 2))}
    ours, permuted = np.zeros(len(subsets)), np.zeros(len(subsets))
    for taken in draws(num_draws, 2, 6):
        ours[subsets[tuple(np.flatnonzero(taken).tolist())]] += 1
        permuted[subsets[tuple(sorted(torch.randperm(6, generator=generator)[:2].tolist()))]] += 1
    freedom = len(subsets) - 1
    statistic = float(((ours - permuted) ** 2 / (ours + permuted)).sum())
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_wrong_arguments_are_named() -> None:
    tokens = random_tokens(3, seed=0)
    with pytest.raises(ValueError, match="k=0"):
        cov_candidates(tokens, CovJudge(0.0, 0.0), 0)
    with pytest.raises(ValueError, match="implementation='numpy'"):
        cov_candidates(tokens, CovJudge(0.0, 0.0), 1, implementation="numpy")
    with pytest.raises(ValueError, match="instruction set"):
        cov_candidates(tokens, CovJudge(0.0, 0.0), 1, isa="neon")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 1e-5, -1e-5, 1e-6, 1e-12])
def test_bounds_at_the_covariance_of_a_token(scale: float, shift: float) -> None:
    generator = np.random.default_rng(5)
    for trial in range(20):
        held = random_tokens(int(generator.integers(1, 300)), trial)
        held = held._replace(advantages=held.advantages * np.float32(scale))
        means = float(held.advantages.mean(dtype=np.float64)), float(np.float32(held.log_probs.mean()))
        covariance = (held.advantages.astype(np.float64) - means[0]) * (held.log_probs.astype(np.float64) - means[1])
        lb, ub = sorted(generator.choice(covariance, 2).tolist())
        judge = CovJudge(*means, lb + shift, ub - shift, 0.2, 0.28)
        expected = cov_candidates(held, judge, 1000, implementation="eager")
        for isa in SETS:
            assert same(cov_candidates(held, judge, 1000, implementation="compiled", isa=isa), expected)


@pytest.mark.parametrize(("advantage", "log_prob"), [(3e4 / 7, -1e5 / 3), (1e-39 / 3, 1e37 / 7)])
def test_means_that_float_cannot_hold(advantage: float, log_prob: float) -> None:
    # Covariances next to the bounds differ by the rounding of both means, and below the smallest float too.
    generator = np.random.default_rng(6)
    for trial in range(40):
        held = random_tokens(200, trial)
        near = [np.float32(mean * (1 + 1e-7 * generator.integers(-3, 4, 200))) for mean in (advantage, log_prob)]
        held = held._replace(advantages=near[0], log_probs=near[1])
        tokens = zip(*(values.astype(np.float64) for values in near), strict=True)
        covariance = [(a - advantage) * (b - log_prob) for a, b in tokens]
        lb = float(generator.choice(covariance))
        for shift in (0.0, 1e-5, -1e-5):
            judge = CovJudge(advantage, log_prob, lb + shift, math.inf)
            expected = cov_candidates(held, judge, 200, implementation="eager")
            for isa in SETS:
                assert same(cov_candidates(held, judge, 200, implementation="compiled", isa=isa), expected)
