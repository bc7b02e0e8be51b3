"""Off-policy weights against slow references; segments of one trajectory share a decision."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.off_policy import CORRECTION_MODES, off_policy_weights, sequence_ratio

BOUNDS = {"cap": 2.0, "low": 0.5, "high": 1.5}
token = st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.booleans())


def slow_weights(mode: str, tokens: list[tuple[float, float, bool]]) -> list[float]:
    sampled = [math.exp(old - rollout) for old, rollout, mask in tokens if mask]
    mean = statistics.geometric_mean(sampled) if sampled else 1.0
    weights = []
    for old, rollout, mask in tokens:
        ratio = math.exp(old - rollout)
        inside = BOUNDS["low"] <= ratio <= BOUNDS["high"]
        value = {
            "none": 1.0,
            "tis": min(ratio, BOUNDS["cap"]),
            "icepop": ratio if inside else 0.0,
            "sequence_mask": float(BOUNDS["low"] <= mean <= BOUNDS["high"]),
        }[mode]
        weights.append(value if mask else 1.0)
    return weights


@pytest.mark.parametrize("mode", CORRECTION_MODES)
@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(token, min_size=1, max_size=20))
def test_equals_the_slow_reference(mode: str, tokens: list[tuple[float, float, bool]]) -> None:
    old, rollout = (torch.tensor(column) for column in list(zip(*tokens, strict=True))[:2])
    mask = torch.tensor([row[2] for row in tokens])
    rounded = list(zip(old.double().tolist(), rollout.double().tolist(), mask.tolist(), strict=True))
    ratios = [math.exp(a - b) for a, b, _ in rounded] + [sequence_ratio([(old, rollout, mask)])]
    if any(abs(ratio - edge) < 1e-5 for ratio in ratios for edge in (0.5, 1.5)):
        return
    weights = off_policy_weights(old, rollout, mask, mode=mode, **BOUNDS)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(slow_weights(mode, rounded), rel=1e-5)


def test_bounds_are_inclusive_and_equal_log_probs_change_nothing() -> None:
    same = torch.tensor([-0.3, -2.0])
    mask = torch.tensor([True, True])
    for mode in CORRECTION_MODES:
        weights = off_policy_weights(same, same, mask, mode=mode, cap=1.0, low=1.0, high=1.0)
        assert weights.tolist() == [1.0, 1.0]


def test_segments_share_one_decision() -> None:
    mask = torch.ones(2, dtype=torch.bool)
    far = (torch.full((2,), -1.0), torch.full((2,), -2.0), mask)
    near = (torch.zeros(6), torch.zeros(6), torch.ones(6, dtype=torch.bool))
    ratio = sequence_ratio([far, near])
    assert ratio == pytest.approx(math.exp(2 / 8))
    assert sequence_ratio([near, far]) == ratio
    arguments = {"mode": "sequence_mask", **BOUNDS}
    assert off_policy_weights(*far, **arguments).tolist() == [0.0, 0.0]
    assert off_policy_weights(*far, **arguments, sequence=ratio).tolist() == [1.0, 1.0]
    assert off_policy_weights(*near, **arguments, sequence=9.0).tolist() == [0.0] * 6


def test_no_sampled_token_has_ratio_one() -> None:
    none = torch.zeros(3, dtype=torch.bool)
    assert sequence_ratio([]) == sequence_ratio([(torch.ones(3), torch.zeros(3), none)]) == 1.0


@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_weights_are_finite_and_without_gradient(mode: str) -> None:
    old = torch.tensor([0.0, -500.0], requires_grad=True)
    weights = off_policy_weights(old, torch.tensor([-500.0, 0.0]), torch.ones(2).bool(), mode=mode, **BOUNDS)
    assert torch.isfinite(weights).all() and not weights.requires_grad


def test_unknown_mode_names_the_key() -> None:
    with pytest.raises(ValueError, match="rollout_correction.mode"):
        off_policy_weights(torch.zeros(1), torch.zeros(1), torch.ones(1).bool(), mode="mis", **BOUNDS)
