"""avg@k, pass@k, maj@k and their intervals against slow references."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.evaluation.metrics import (
    ProblemSamples,
    avg_at_k,
    bootstrap_estimate,
    majority_at_k,
    pass_at_k,
    success_estimate,
)
from spear_megatron.observability.intervals import wilson_interval

samples = st.lists(st.sampled_from(["7", "8", "9", None]), min_size=1, max_size=7)


def problem(answers: list[str | None], truth: str = "7", source: str = "") -> ProblemSamples:
    return ProblemSamples("p", tuple(answer == truth for answer in answers), tuple(answers), source)


def slow_majority(subset: list[tuple[str | None, bool]]) -> float:
    answers = [answer for answer, _ in subset if answer is not None]
    if not answers:
        return 0.0
    top = max(answers.count(answer) for answer in answers)
    tied = sorted({answer for answer in answers if answers.count(answer) == top})
    return sum(dict(subset)[answer] for answer in tied) / len(tied)


@given(samples, st.data())
@settings(max_examples=200, deadline=None)
def test_metrics_equal_enumeration_of_all_subsets(answers: list[str | None], data: st.DataObject) -> None:
    item = problem(answers)
    k = data.draw(st.integers(1, len(answers)))
    subsets = list(itertools.combinations(list(zip(item.answers, item.correct, strict=True)), k))
    assert avg_at_k(item, k) == sum(item.correct[:k]) / k
    expected = sum(any(right for _, right in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(item, k) == pytest.approx(expected, abs=1e-12)
    expected = sum(slow_majority(list(subset)) for subset in subsets) / len(subsets)
    assert majority_at_k(item, k, seed=0, problem_index=0) == pytest.approx(expected, abs=1e-12)


def test_sampled_subsets_approach_the_exact_value_and_are_keyed() -> None:
    item = problem(["7"] * 9 + ["8"] * 8 + [None] * 5)
    subsets = itertools.combinations(list(zip(item.answers, item.correct, strict=True)), 5)
    exact = [slow_majority(list(subset)) for subset in subsets]
    drawn = majority_at_k(item, 5, seed=3, problem_index=1)
    assert math.comb(22, 5) > 4096
    assert drawn == pytest.approx(sum(exact) / len(exact), abs=0.03)
    before = torch.get_rng_state()
    assert majority_at_k(item, 5, seed=3, problem_index=1) == drawn
    assert majority_at_k(item, 5, seed=4, problem_index=1) != drawn
    assert torch.equal(before, torch.get_rng_state())


def test_wilson_matches_published_values_and_its_defining_equation() -> None:
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for rate, trials in [(0.1, 30), (0.9, 128), (0.33, 7)]:
        for bound in wilson_interval(rate, trials):
            z = abs(rate - bound) / math.sqrt(bound * (1 - bound) / trials)
            assert z == pytest.approx(1.959964, abs=1e-5)


def test_bootstrap_interval_against_a_plain_loop() -> None:
    values = [0.0, 0.25, 1.0, 1.0, 0.5, 0.75, 0.0, 1.0]
    estimate = bootstrap_estimate(values, seed=1, purpose="avg@4", num_resamples=4000)
    draw = torch.Generator().manual_seed(99)
    means = []
    for _ in range(4000):
        means.append(sum(values[int(torch.randint(len(values), (), generator=draw))] for _ in values) / len(values))
    means.sort()
    assert estimate.value == sum(values) / len(values)
    assert estimate.low == pytest.approx(means[100], abs=0.05)
    assert estimate.high == pytest.approx(means[3899], abs=0.05)
    assert bootstrap_estimate(values, seed=1, purpose="avg@4", num_resamples=4000) == estimate


def test_bootstrap_covers_the_truth_about_as_often_as_promised() -> None:
    draw = torch.Generator().manual_seed(5)
    hits = 0
    for trial in range(200):
        values = (torch.rand(60, generator=draw) < 0.4).double().tolist()
        estimate = bootstrap_estimate(values, seed=trial, purpose="coverage", num_resamples=400)
        hits += estimate.low <= 0.4 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


def test_success_interval_is_wilson_for_one_sample_and_widens_for_repeated_ones() -> None:
    single = [problem(["7"])] * 30 + [problem(["8"])] * 10
    estimate = success_estimate(single)
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(0.75, 40))
    copied = [problem(["7"] * 8)] * 30 + [problem(["8"] * 8)] * 10
    wide = success_estimate(copied)
    assert (wide.low, wide.high) == pytest.approx(wilson_interval(0.75, 40), abs=0.01)
    mixed = [problem(["7"] * 6 + ["8"] * 2)] * 40
    narrow = success_estimate(mixed)
    assert (narrow.low, narrow.high) == pytest.approx(wilson_interval(0.75, 320))
    perfect = success_estimate([problem(["7"] * 8)] * 16)
    assert perfect.value == 1.0 and perfect.low == pytest.approx(wilson_interval(1.0, 16)[0])


@pytest.mark.parametrize("k", [0, 3])
def test_bad_k_is_refused(k: int) -> None:
    for call in (avg_at_k, pass_at_k):
        with pytest.raises(ValueError, match="between 1 and the 2 samples"):
            call(problem(["7", "8"]), k)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        ProblemSamples("p", (), ())
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_estimate([], seed=0, purpose="avg@1")
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(0.5, 10, confidence=1.0)
    with pytest.raises(ValueError, match="rate in"):
        wilson_interval(1.5, 10)
