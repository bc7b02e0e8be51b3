"""Generalised advantage estimation against its definition as a sum, and its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.gae import gae

step = st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.booleans())
unit = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@settings(max_examples=150, deadline=None)
@given(st.lists(step, min_size=1, max_size=20), unit, unit)
def test_equals_the_sum_of_discounted_errors(steps: list[tuple[float, float, bool]], gamma: float, lam: float) -> None:
    rewards, values, mask = (list(column) for column in zip(*steps, strict=True))
    kept = [u for u in range(len(steps)) if mask[u]]
    following = ([values[u] for u in kept] + [0.0])[1:]
    errors = [rewards[u] + gamma * v - values[u] for u, v in zip(kept, following)]
    advantages, returns = gae(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(mask),
        gamma=gamma,
        lam=lam,
    )
    expected = [0.0] * len(steps)
    for position, u in enumerate(kept):
        expected[u] = sum((gamma * lam) ** j * error for j, error in enumerate(errors[position:]))
    assert advantages.dtype == returns.dtype == torch.float32
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert returns.tolist() == pytest.approx(
        [e + v if m else 0 for e, v, m in zip(expected, values, mask, strict=True)], abs=1e-6
    )


def test_tool_tokens_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(2, 6, generator=generator)
    mask = torch.tensor([False, True, True, False, False, True, False, True, False, True, True])
    wide = torch.full((2, 11), float("nan"))
    wide[:, mask] = torch.stack([rewards, values])
    plain = gae(rewards, values, torch.ones(6, dtype=torch.bool), gamma=0.9, lam=0.8)
    spread = gae(wide[0], wide[1], mask, gamma=0.9, lam=0.8)
    for short, long in zip(plain, spread, strict=True):
        assert torch.equal(long[mask], short) and not long[~mask].any()


def test_limits_of_lambda() -> None:
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.25, 0.75])
    mask = torch.ones(3, dtype=torch.bool)
    _, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert returns.tolist() == [0.25, 0.5, 1.0]
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    assert advantages.tolist() == [0.5 * 0.25 - 0.5, 0.5 * 0.75 - 0.25, 1.0 - 0.75]


def test_no_sampled_token() -> None:
    advantages, returns = gae(torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert advantages.tolist() == returns.tolist() == [0.0] * 3
