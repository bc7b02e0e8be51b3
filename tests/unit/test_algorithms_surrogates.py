"""The four surrogates against slow references by cases, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.kernels.policy_surrogates import SURROGATE_MODES, policy_surrogate, token_surrogate

LOW, HIGH, DUAL, COEF = 0.2, 0.28, 3.0, 0.7
SETTINGS = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH, "clip_ratio_c": DUAL, "kl_cov_coef": COEF}
CLIP = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH, "clip_ratio_c": DUAL}

token = st.tuples(st.floats(-6, 0), st.floats(-6, 0), st.floats(-2, 2), st.booleans())


def slow_token(mode: str, logp: float, old: float, advantage: float, chosen: bool) -> tuple[float, float]:
    """(surrogate, d surrogate / d logp) of one token."""
    ratio = math.exp(logp - old)
    if mode == "gpg":
        return logp * advantage, advantage
    if mode == "kl_cov":
        distance, slope = abs(logp - old), float(logp > old) - float(logp < old)
        cost = (COEF * distance, COEF * slope) if chosen else (0.0, 0.0)
        return ratio * advantage - cost[0], ratio * advantage - cost[1]
    inside = min(max(ratio, 1 - LOW), 1 + HIGH)
    clipped = inside * advantage < ratio * advantage
    value, gradient = (inside * advantage, 0.0) if clipped else (ratio * advantage, ratio * advantage)
    if mode == "clip_cov":
        return (0.0, 0.0) if chosen else (value, gradient)
    if advantage < 0 and value < DUAL * advantage:
        return DUAL * advantage, 0.0
    return value, gradient


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(token, min_size=1, max_size=20))
def test_equals_the_slow_reference(mode: str, tokens: list[tuple[float, float, float, bool]]) -> None:
    columns = list(zip(*tokens, strict=True))
    logp, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in columns[:3])
    chosen = torch.tensor([row[3] for row in tokens])
    selected = chosen if mode in ("clip_cov", "kl_cov") else None
    logp.requires_grad_()
    result = token_surrogate(mode, logp, old, advantages, selected=selected, **SETTINGS)
    result.surrogate.sum().backward()
    for i, row in enumerate(tokens):
        value, gradient = slow_token(mode, *row)
        assert result.surrogate[i].item() == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert logp.grad[i].item() == pytest.approx(gradient, rel=1e-9, abs=1e-12)
        assert result.log_ratio[i].item() == pytest.approx(row[0] - row[1])
    assert not result.surrogate.isnan().any() and not result.log_ratio.requires_grad


@pytest.mark.parametrize("mode", SURROGATE_MODES)
def test_gradients_by_finite_differences(mode: str) -> None:
    generator = torch.Generator().manual_seed(3)
    old = -3 * torch.rand(40, generator=generator, dtype=torch.float64)
    logp = (old + 0.6 * torch.randn(40, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(40, generator=generator, dtype=torch.float64)
    selected = torch.rand(40, generator=generator) < 0.3 if mode in ("clip_cov", "kl_cov") else None

    def objective(values: torch.Tensor) -> torch.Tensor:
        return token_surrogate(mode, values, old, advantages, selected=selected, **SETTINGS).surrogate

    assert torch.autograd.gradcheck(objective, (logp,), eps=1e-7, atol=1e-5)


def test_vanilla_is_the_policy_surrogate() -> None:
    generator = torch.Generator().manual_seed(4)
    logp, old = -torch.rand(2, 50, generator=generator)
    advantages = torch.randn(50, generator=generator)
    expected = policy_surrogate(logp, old, advantages, **CLIP)
    actual = token_surrogate("vanilla", logp, old, advantages, selected=None, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_clip_cov_without_selected_tokens_is_ppo_without_dual_clip() -> None:
    logp, old = torch.tensor([2.0, 0.1, -1.0]), torch.zeros(3)
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    none = torch.zeros(3, dtype=torch.bool)
    result = token_surrogate("clip_cov", logp, old, advantages, selected=none, **SETTINGS)
    wide = policy_surrogate(logp, old, advantages, **{**CLIP, "clip_ratio_c": 1e9})
    assert torch.equal(result.surrogate, wide.surrogate) and torch.equal(result.clipped, wide.clipped)
    assert not result.dual_clipped.any()
    assert result.surrogate[0] < -DUAL


def test_selected_tokens_of_clip_cov_keep_no_gradient_and_kl_cov_ignores_the_clip() -> None:
    logp = torch.tensor([0.0, 1.0], requires_grad=True)
    old, advantages = torch.zeros(2), torch.ones(2)
    token_surrogate(
        "clip_cov", logp, old, advantages, selected=torch.tensor([True, True]), **SETTINGS
    ).surrogate.sum().backward()
    assert logp.grad.tolist() == [0.0, 0.0]
    logp.grad = None
    result = token_surrogate("kl_cov", logp, old, advantages, selected=torch.tensor([False, False]), **SETTINGS)
    result.surrogate.sum().backward()
    assert logp.grad.tolist() == pytest.approx([1.0, math.e])
    assert not result.clipped.any()


@pytest.mark.parametrize("mode", ["vanilla", "clip_cov", "kl_cov"])
def test_extreme_ratios_stay_finite(mode: str) -> None:
    logp = torch.tensor([0.0, -200.0, 0.0], requires_grad=True)
    old, advantages = torch.tensor([-200.0, 0.0, -200.0]), torch.tensor([-1.0, 1.0, 1.0])
    selected = None if mode == "vanilla" else torch.tensor([False, True, True])
    result = token_surrogate(mode, logp, old, advantages, selected=selected, **SETTINGS)
    result.surrogate.sum().backward()
    assert torch.isfinite(result.surrogate).all() and torch.isfinite(logp.grad).all()
    assert result.log_ratio.abs().max() == 20.0


@pytest.mark.parametrize(
    ("mode", "selected"), [("vanilla", True), ("gpg", True), ("clip_cov", False), ("kl_cov", False)]
)
def test_selected_tokens_are_asked_for_where_they_mean_something(mode: str, selected: bool) -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=mode):
        token_surrogate(mode, one, one, one, selected=torch.tensor([True]) if selected else None, **SETTINGS)


def test_unknown_mode_is_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="clip_cov"):
        token_surrogate("clip-cov", one, one, one, selected=None, **SETTINGS)
