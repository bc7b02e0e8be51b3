"""Surrogate, KL estimators and aggregation against slow references, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.aggregation import AGGREGATION_MODES, Totals, count_totals, token_weights
from spear_megatron.algorithms.kl import KL_KINDS, kl_estimate, kl_penalty_in_reward
from spear_megatron.kernels.policy_surrogates import policy_surrogate

CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}

token = st.tuples(
    st.floats(-8, 0), st.floats(-8, 0), st.one_of(st.floats(-2, 2), st.just(0.0), st.sampled_from([-1.0, 1.0]))
)


def slow_token(logp: float, old: float, advantage: float) -> tuple[float, float, bool, bool]:
    """(surrogate, d surrogate / d logp, clipped, dual clipped) of one token, by cases."""
    ratio = math.exp(logp - old)
    low, high = 1 - CLIP["clip_ratio_low"], 1 + CLIP["clip_ratio_high"]
    inside = min(max(ratio, low), high)
    clipped = inside * advantage < ratio * advantage
    value = inside * advantage if clipped else ratio * advantage
    gradient = 0.0 if clipped else ratio * advantage
    if advantage < 0 and value < CLIP["clip_ratio_c"] * advantage:
        return CLIP["clip_ratio_c"] * advantage, 0.0, clipped, True
    return value, gradient, clipped, False


@settings(max_examples=300, deadline=None)
@given(st.lists(token, min_size=1, max_size=20))
def test_surrogate_equals_the_slow_reference(tokens: list[tuple[float, float, float]]) -> None:
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True)]
    logp = columns[0].requires_grad_()
    result = policy_surrogate(logp, columns[1], columns[2], **CLIP)
    result.surrogate.sum().backward()
    for i, (a, b, c) in enumerate(tokens):
        value, gradient, clipped, dual = slow_token(a, b, c)
        assert result.surrogate[i].item() == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert logp.grad[i].item() == pytest.approx(gradient, rel=1e-9, abs=1e-12)
        assert bool(result.dual_clipped[i]) == dual
        if abs(math.exp(a - b) - 0.8) > 1e-9 and abs(math.exp(a - b) - 1.28) > 1e-9:
            assert bool(result.clipped[i]) == clipped
        assert result.log_ratio[i].item() == pytest.approx(a - b)


def test_on_policy_gradient_is_the_advantage() -> None:
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([0.5, -0.25, 0.0])
    policy_surrogate(logp, logp.detach(), advantages, **CLIP).surrogate.sum().backward()
    assert torch.equal(logp.grad, advantages)


def test_extreme_ratios_stay_finite() -> None:
    logp = torch.tensor([0.0, -200.0], requires_grad=True)
    result = policy_surrogate(logp, torch.tensor([-200.0, 0.0]), torch.tensor([-1.0, 1.0]), **CLIP)
    result.surrogate.sum().backward()
    assert torch.isfinite(result.surrogate).all() and torch.isfinite(logp.grad).all()


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_estimators(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(50, generator=generator, dtype=torch.float64)
    ref = -3 * torch.rand(50, generator=generator, dtype=torch.float64)
    logp.requires_grad_()
    formulas = {
        "kl": lambda d: d,
        "k1": lambda d: d,
        "abs": lambda d: math.fabs(d),
        "mse": lambda d: d * d / 2,
        "k2": lambda d: d * d / 2,
        "low_var_kl": lambda d: math.exp(-d) + d - 1,
        "k3": lambda d: math.exp(-d) + d - 1,
    }
    slopes = {"abs": lambda d: math.copysign(1, d), "mse": lambda d: d, "k2": lambda d: d}
    slopes |= {"kl": lambda d: 1.0, "k1": lambda d: 1.0}
    slopes |= {name: (lambda d: 1 - math.exp(-d)) for name in ("low_var_kl", "k3")}
    estimate = kl_estimate(logp, ref, kind=kind)
    estimate.sum().backward()
    for i, difference in enumerate((logp - ref).tolist()):
        assert estimate[i].item() == pytest.approx(formulas[kind](difference), abs=1e-12)
        assert logp.grad[i].item() == pytest.approx(slopes[kind](difference), abs=1e-12)


def test_k1_and_k3_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(1)
    policy = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        expectation = (policy.exp() * kl_estimate(policy, reference, kind=kind)).sum()
        assert expectation.item() == pytest.approx(exact.item(), abs=1e-12)


def test_kl_penalty_counts_sampled_tokens_only() -> None:
    logp, ref = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([-5.0, -1.5, -1.0])
    penalty = kl_penalty_in_reward(logp, ref, torch.tensor([False, True, True]), kind="k1", coef=0.1)
    assert penalty == pytest.approx(0.1 * (0.5 - 1.0))


def slow_aggregate(mode: str, masks: list[list[bool]], values: list[list[float]], length: int) -> float:
    rows = [[v for v, m in zip(value, mask, strict=True) if m] for value, mask in zip(values, masks, strict=True)]
    tokens = sum(len(row) for row in rows)
    if tokens == 0:
        return 0.0
    if mode == "token-mean":
        return sum(sum(row) for row in rows) / tokens
    if mode == "seq-mean-token-sum":
        return sum(sum(row) for row in rows) / len(rows)
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) if row else 0.0 for row in rows) / len(rows)
    return sum(sum(row) for row in rows) / (len(rows) * length)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.booleans(), st.floats(-5, 5)), min_size=1, max_size=8), min_size=1, max_size=6),
    st.sampled_from(AGGREGATION_MODES),
    st.integers(1, 100),
    st.integers(0, 6),
)
def test_weights_aggregate_like_the_definition_on_any_split(
    rows: list[list[tuple[bool, float]]], mode: str, length: int, cut: int
) -> None:
    masks = [[m for m, _ in row] for row in rows]
    values = [[v for _, v in row] for row in rows]
    tensors = [torch.tensor(mask) for mask in masks]
    ids = range(len(rows))
    parts = [count_totals(ids[part], tensors[part]) for part in (slice(cut), slice(cut, None))]
    totals = count_totals((), (), lambda own: [own, *(part.row_tokens for part in parts)])
    constants = {"mode": mode, "totals": totals, "max_response_length": length}
    total = sum(
        float((token_weights(m, row=i, **constants).double() * torch.tensor(v)).sum())
        for i, m, v in zip(ids, tensors, values, strict=True)
    )
    assert total == pytest.approx(slow_aggregate(mode, masks, values, length), rel=1e-5, abs=1e-5)


def test_empty_rows_count_in_the_denominator() -> None:
    mask = torch.tensor([False, True, True])
    totals = count_totals("abcd", [mask, ~mask & False, ~mask & False, ~mask & False])
    weights = token_weights(mask, row="a", mode="seq-mean-token-mean", totals=totals, max_response_length=1)
    assert weights.tolist() == [0.0, 0.125, 0.125]


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_segments_of_a_trajectory_weigh_as_one_row(mode: str) -> None:
    """A trajectory whose prompt is rebuilt counts like one that grew: not once per segment."""
    parts = [torch.tensor([False, True, True]), torch.tensor([False, True])]
    other = torch.tensor([False, True])
    whole = count_totals(["a", "b"], [torch.cat(parts), other])
    split = count_totals(["a"], parts[:1], lambda own: [own, {"b": 1, "a": 1}])
    assert (split.num_rows, split.num_tokens) == (2, 4)
    expected = token_weights(torch.cat(parts), row="a", mode=mode, totals=whole, max_response_length=9)
    weights = [token_weights(part, row="a", mode=mode, totals=split, max_response_length=9) for part in parts]
    assert torch.equal(torch.cat(weights), expected)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="token-mean"):
        token_weights(torch.tensor([True]), row="a", mode="mean", totals=Totals({"a": 1}), max_response_length=1)
