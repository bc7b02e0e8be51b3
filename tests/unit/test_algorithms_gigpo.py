"""Step returns and step advantages against slow references."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.gigpo import STEP_MODES, step_advantages, step_returns

steps = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.7, 9.5, 10.0, -0.1]), st.integers(0, 2), st.sampled_from(["door", "desk"])),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 10), max_size=12), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_returns_are_discounted_sums(rewards: list[float], gamma: float) -> None:
    expected = [sum(gamma**j * reward for j, reward in enumerate(rewards[t:])) for t in range(len(rewards))]
    assert step_returns(rewards, gamma) == pytest.approx(expected)


@pytest.mark.parametrize("mode", STEP_MODES)
@settings(max_examples=100, deadline=None)
@given(rows=steps)
def test_equals_the_slow_reference(mode: str, rows: list[tuple[float, int, str]]) -> None:
    expected = []
    for value, group, anchor in rows:
        peers = [v for v, g, a in rows if (g, a) == (group, anchor)]
        if len(set(peers)) == 1:
            expected.append(0.0)
            continue
        centred = value - statistics.fmean(peers)
        expected.append(centred / (statistics.stdev(peers) + 1e-6) if mode == "mean_std_norm" else centred)
    anchors = [(group, anchor) for _, group, anchor in rows]
    actual = step_advantages([value for value, _, _ in rows], anchors, mode=mode)
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert [a == 0 for a in actual] == [e == 0 for e in expected] or mode == "mean_norm"


@pytest.mark.parametrize("mode", STEP_MODES)
def test_order_does_not_matter(mode: str) -> None:
    draw = random.Random(0)
    returns = [draw.random() for _ in range(200)]
    anchors = [((0, draw.randrange(3)), f"state {draw.randrange(4)}") for _ in returns]
    straight = step_advantages(returns, anchors, mode=mode)
    order = list(range(200))
    draw.shuffle(order)
    shuffled = step_advantages([returns[i] for i in order], [anchors[i] for i in order], mode=mode)
    assert shuffled == [straight[i] for i in order]


def test_the_same_observation_in_another_task_is_another_anchor() -> None:
    anchors = [((1, 0), "hall"), ((1, 0), "hall"), ((1, 1), "hall"), ((1, 0), "attic")]
    assert step_advantages([1.0, 0.0, 5.0, 7.0], anchors, mode="mean_norm") == [0.5, -0.5, 0.0, 0.0]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="gigpo.mode"):
        step_advantages([], [], mode="std")
    with pytest.raises(ValueError, match="one per step"):
        step_advantages([1.0], [], mode="mean_norm")
