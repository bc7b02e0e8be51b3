"""Group-relative advantages against a slow reference."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.advantages import grpo_advantages
from spear_megatron.algorithms.config import AlgorithmConfig, KlCtrlConfig
from spear_megatron.data.rows import trajectory_advantages
from spear_megatron.types import TrajectoryId


def slow_advantages(rewards: list[float], groups: list[int], valid: list[bool], norm_by_std: bool) -> list[float]:
    result = []
    for reward, group, ok in zip(rewards, groups, valid, strict=True):
        peers = [r for r, g, v in zip(rewards, groups, valid, strict=True) if g == group and v]
        if not ok or len(peers) == 1:
            result.append(0.0)
            continue
        advantage = reward - statistics.fmean(peers)
        result.append(advantage / (statistics.stdev(peers) + 1e-6) if norm_by_std else advantage)
    return result


members = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 0.1, 0.5, 1.0]), st.integers(0, 4), st.booleans()), min_size=1, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(members, st.booleans())
def test_equals_the_slow_reference(rows: list[tuple[float, int, bool]], norm_by_std: bool) -> None:
    rewards, groups, valid = (list(column) for column in zip(*rows, strict=True))
    actual = grpo_advantages(torch.tensor(rewards), groups, torch.tensor(valid), norm_by_std=norm_by_std)
    expected = slow_advantages([float(torch.tensor(r)) for r in rewards], groups, valid, norm_by_std)
    assert actual.tolist() == pytest.approx(expected, abs=1e-4 if norm_by_std else 1e-6)


@settings(max_examples=50, deadline=None)
@given(members, st.randoms(use_true_random=False))
def test_order_does_not_matter(rows: list[tuple[float, int, bool]], random) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    rewards, groups, valid = (list(column) for column in zip(*rows, strict=True))
    straight = grpo_advantages(torch.tensor(rewards), groups, torch.tensor(valid), norm_by_std=True)
    shuffled = grpo_advantages(
        torch.tensor([rewards[i] for i in order]),
        [groups[i] for i in order],
        torch.tensor([valid[i] for i in order]),
        norm_by_std=True,
    )
    assert torch.equal(shuffled, straight[order])


def test_failed_members_change_nothing_even_with_nan_rewards() -> None:
    base = grpo_advantages(torch.tensor([1.0, 0.0]), ["a", "a"], torch.tensor([True, True]), norm_by_std=False)
    more = grpo_advantages(
        torch.tensor([1.0, float("nan"), 0.0]), ["a"] * 3, torch.tensor([True, False, True]), norm_by_std=False
    )
    assert more.tolist() == [base[0].item(), 0.0, base[1].item()]


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        grpo_advantages(torch.tensor([float("inf"), 0.0]), ["a", "a"], torch.tensor([True, True]), norm_by_std=False)
    with pytest.raises(ValueError, match="one per trajectory"):
        grpo_advantages(torch.tensor([1.0, 0.0]), ["a"], torch.tensor([True, True]), norm_by_std=False)


def test_groups_of_a_step_are_told_apart_by_id() -> None:
    rewards = {TrajectoryId(3, task, sample): float(sample == task) for task in (7, 1) for sample in range(2)}
    advantages = trajectory_advantages(rewards, norm_by_std=False)
    assert advantages == {
        TrajectoryId(3, 1, 0): -0.5,
        TrajectoryId(3, 1, 1): 0.5,
        TrajectoryId(3, 7, 0): 0.0,
        TrajectoryId(3, 7, 1): 0.0,
    }


@pytest.mark.parametrize("kwargs", [{"adv_estimator": "gae"}, {"kl_penalty": "k9"}])
def test_config_names_the_key(kwargs: dict) -> None:
    with pytest.raises(ValueError, match=f"algorithm.{next(iter(kwargs))}"):
        AlgorithmConfig(**kwargs)


def test_negative_kl_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        KlCtrlConfig(kl_coef=-1.0)
