"""The two coefficients: reference values, ends, monotony."""

from __future__ import annotations

import pytest

from spear_megatron.algorithms.schedules import ScheduledCurriculum, replay_coefficient, toolcall_coefficient


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.99994), (50, 0.8536), (100, 0.5), (150, 0.1464), (200, 0.0), (201, 0.0), (10**6, 0.0)]
)
def test_toolcall_reference_values(step: int, expected: float) -> None:
    assert toolcall_coefficient("cosine", step, 200) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("warmup", "step", "expected"),
    [(300, 50, 0.0670), (300, 100, 0.25), (300, 150, 0.5), (300, 200, 0.75), (300, 300, 1.0), (300, 301, 1.0)]
    + [(200, 50, 0.1464), (200, 100, 0.5), (200, 150, 0.8536)],
)
def test_replay_reference_values(warmup: int, step: int, expected: float) -> None:
    assert replay_coefficient(step, coef=1.0, warmup_steps=warmup) == pytest.approx(expected, abs=5e-5)
    assert replay_coefficient(step, coef=0.3, warmup_steps=warmup) == pytest.approx(0.3 * expected, abs=5e-5)


def test_the_other_modes_do_not_depend_on_the_step() -> None:
    assert {toolcall_coefficient("none", step, 10) for step in range(1, 30)} == {0.0}
    assert {toolcall_coefficient("constant", step, 10) for step in range(1, 30)} == {1.0}


def test_ends_are_exact_and_the_way_there_is_monotone() -> None:
    falling = [toolcall_coefficient("cosine", step, 7) for step in range(0, 12)]
    rising = [replay_coefficient(step, coef=2.0, warmup_steps=7) for step in range(0, 12)]
    assert falling[0] == 1.0 and falling[7:] == [0.0] * 5
    assert rising[0] == 0.0 and rising[7:] == [2.0] * 5
    assert all(a > b for a, b in zip(falling[:7], falling[1:8], strict=True))
    assert all(a < b for a, b in zip(rising[:7], rising[1:8], strict=True))


def test_unknown_mode_names_the_key() -> None:
    with pytest.raises(ValueError, match="use_toolcall_reward"):
        toolcall_coefficient("linear", 1, 10)


def test_the_scheduled_curriculum_is_both_functions() -> None:
    curriculum = ScheduledCurriculum(mode="cosine", max_steps=200, coef=2.0, warmup_steps=300)
    for step in (1, 50, 200, 300, 900):
        assert curriculum.mu(step) == toolcall_coefficient("cosine", step, 200)
        assert curriculum.gamma(step) == replay_coefficient(step, coef=2.0, warmup_steps=300)
