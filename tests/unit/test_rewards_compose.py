"""Composition of rewards: every form, and linearity in the coefficient."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.rewards.compose import RewardRule, base_reward, shaped_reward, tool_bonus
from spear_megatron.types import RewardParts

PLAIN = RewardRule(form="per_turn", cap=1.0, format_reward=0.0, invalid_action_penalty=0.0)


def test_plain_reward_is_outcome_plus_penalty() -> None:
    parts = RewardParts(outcome=1.0, penalty=-0.25, num_tool_calls=9, num_invalid_actions=3)
    assert base_reward(parts, PLAIN) == 0.75
    assert shaped_reward(parts, PLAIN, 0.0) == 0.75


@pytest.mark.parametrize(("invalid", "expected"), [(0, 1.1), (1, 0.8), (4, 0.2)])
def test_format_reward_and_invalid_actions(invalid: int, expected: float) -> None:
    rule = RewardRule(form="per_turn", cap=1.0, format_reward=0.1, invalid_action_penalty=0.2)
    assert base_reward(RewardParts(outcome=1.0, num_invalid_actions=invalid), rule) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("form", "success", "turns", "calls", "cap", "expected"),
    [
        ("per_turn", True, 3, 7, 1.0, 0.3),
        ("per_turn", False, 3, 7, 1.0, 0.3),
        ("per_turn", False, 12, 7, 1.0, 1.0),
        ("per_turn", False, 12, 7, 0.5, 0.5),
        ("per_turn", False, 0, 0, 1.0, 0.0),
        ("per_call", False, 3, 7, 1.0, 0.7),
        ("per_call", True, 3, 17, 1.0, 1.0),
        ("any_if_correct", True, 0, 0, 1.0, 0.0),
        ("any_if_correct", True, 1, 1, 0.4, 1.0),
        ("any_if_correct", False, 6, 9, 1.0, 0.6),
        ("any_if_correct", False, 6, 9, 0.4, 0.4),
    ],
)
def test_tool_bonus(form: str, success: bool, turns: int, calls: int, cap: float, expected: float) -> None:
    parts = RewardParts(outcome=0.0, success=success, num_tool_turns=turns, num_tool_calls=calls)
    rule = RewardRule(form=form, cap=cap, format_reward=0.0, invalid_action_penalty=0.0)
    assert tool_bonus(parts, rule) == pytest.approx(expected)


def test_paper_and_released_values() -> None:
    """Seven calls of a wrong answer at the start of training: -1 + 0.7; the Qwen3 form gives a solved one +1."""
    wrong = RewardParts(outcome=-1.0, num_tool_turns=7, num_tool_calls=7)
    solved = RewardParts(outcome=1.0, success=True, num_tool_turns=2, num_tool_calls=2)
    qwen3 = RewardRule(form="any_if_correct", cap=1.0, format_reward=0.0, invalid_action_penalty=0.0)
    assert shaped_reward(wrong, PLAIN, 1.0) == pytest.approx(-0.3)
    assert shaped_reward(solved, PLAIN, 0.5) == pytest.approx(1.1)
    assert shaped_reward(solved, qwen3, 0.5) == pytest.approx(1.5)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(-2, 2),
    st.floats(-1, 0),
    st.booleans(),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 5),
    st.sampled_from(["per_turn", "per_call", "any_if_correct"]),
    st.floats(0, 1),
)
def test_recomposing_equals_shaping(
    outcome: float, penalty: float, success: bool, turns: int, calls: int, invalid: int, form: str, mu: float
) -> None:
    parts = RewardParts(outcome, calls, penalty, success, turns, invalid)
    rule = RewardRule(form=form, cap=1.0, format_reward=0.1, invalid_action_penalty=0.1)
    assert shaped_reward(parts, rule, mu) == base_reward(parts, rule) + mu * tool_bonus(parts, rule)
    assert 0.0 <= tool_bonus(parts, rule) <= 1.0


def test_unknown_form_names_the_key() -> None:
    with pytest.raises(ValueError, match="toolcall_reward_form"):
        tool_bonus(RewardParts(outcome=1.0), RewardRule("per_token", 1.0, 0.0, 0.0))
