"""Group-relative advantages against a slow reference."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.advantages import grpo_advantages, reinforce_plus_plus_advantages, rloo_advantages
from spear_megatron.algorithms.config import AlgorithmConfig, KlCtrlConfig
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


@pytest.mark.parametrize("kwargs", [{"adv_estimator": "gae"}, {"kl_penalty": "k9"}])
def test_config_names_the_key(kwargs: dict) -> None:
    with pytest.raises(ValueError, match=f"algorithm.{next(iter(kwargs))}"):
        AlgorithmConfig(**kwargs)


def test_negative_kl_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        KlCtrlConfig(kl_coef=-1.0)


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_the_only_member_of_a_group_gets_zero_or_its_reward(norm_by_std: bool) -> None:
    rewards, groups, valid = torch.tensor([0.7, 1.0, 0.0, 5.0]), ["a", "b", "b", "a"], torch.tensor([1, 1, 1, 0]).bool()
    zero = grpo_advantages(rewards, groups, valid, norm_by_std=norm_by_std)
    reward = grpo_advantages(rewards, groups, valid, norm_by_std=norm_by_std, singleton="reward")
    assert zero[0] == 0.0 and reward[0] == rewards[0] and reward[3] == 0.0
    assert torch.equal(zero[1:], reward[1:])
    with pytest.raises(ValueError, match="singleton_advantage"):
        grpo_advantages(rewards, groups, valid, norm_by_std=norm_by_std, singleton="one")


@pytest.mark.parametrize("reward", [0.1, 0.7, -1.0 / 3.0])
@pytest.mark.parametrize("size", [3, 6, 7])
def test_equal_rewards_give_exact_zeros(reward: float, size: int) -> None:
    """A mean's rounding error must not pass for a positive advantage: replay asks for more than zero."""
    values, valid = torch.full((size,), reward, dtype=torch.float64), torch.ones(size, dtype=torch.bool)
    for norm_by_std in (True, False):
        assert not grpo_advantages(values, [0] * size, valid, norm_by_std=norm_by_std).any()
    assert not rloo_advantages(values, [0] * size, valid).any()
    assert not reinforce_plus_plus_advantages(values, range(1, size + 1), valid).any()


@settings(max_examples=100, deadline=None)
@given(members)
def test_rloo_equals_the_slow_reference(rows: list[tuple[float, int, bool]]) -> None:
    rewards, groups, valid = (list(column) for column in zip(*rows, strict=True))
    expected = []
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in range(len(rows)) if j != i and groups[j] == groups[i] and valid[j]]
        expected.append(reward - statistics.fmean(others) if valid[i] and others else 0.0)
    values = torch.tensor(rewards, dtype=torch.float64)
    assert rloo_advantages(values, groups, torch.tensor(valid)).tolist() == pytest.approx(expected, abs=1e-6)
    kept = rloo_advantages(values, groups, torch.tensor(valid), singleton="reward")
    peers = [group for group, ok in zip(groups, valid, strict=True) if ok]
    alone = [i for i in range(len(rows)) if valid[i] and peers.count(groups[i]) == 1]
    assert kept[alone].tolist() == pytest.approx([rewards[i] for i in alone])


weighted = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 0.1, 0.5, 1.0]), st.integers(0, 9), st.booleans()), min_size=1, max_size=30
)


@settings(max_examples=100, deadline=None)
@given(weighted)
def test_reinforce_plus_plus_whitens_over_all_tokens(rows: list[tuple[float, int, bool]]) -> None:
    tokens = [reward for reward, count, valid in rows if valid for _ in range(count)]
    expected = [0.0] * len(rows)
    if len(set(tokens)) > 1:
        mean, std = statistics.fmean(tokens), statistics.stdev(tokens)
        expected = [(reward - mean) / (std + 1e-6) if valid else 0.0 for reward, _, valid in rows]
    rewards, counts, valid = (list(column) for column in zip(*rows, strict=True))
    actual = reinforce_plus_plus_advantages(torch.tensor(rewards, dtype=torch.float64), counts, torch.tensor(valid))
    assert actual.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(weighted, st.randoms(use_true_random=False))
def test_order_does_not_matter_to_the_other_estimators(rows: list[tuple[float, int, bool]], random) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)

    def both(positions: list[int]) -> list[torch.Tensor]:
        rewards = torch.tensor([rows[i][0] for i in positions], dtype=torch.float64) / 3
        integers, valid = [rows[i][1] for i in positions], torch.tensor([rows[i][2] for i in positions])
        return [
            rloo_advantages(rewards, integers, valid),
            reinforce_plus_plus_advantages(rewards, integers, valid),
        ]

    for straight, shuffled in zip(both(list(range(len(rows)))), both(order), strict=True):
        assert torch.equal(shuffled, straight[order])


def test_reinforce_plus_plus_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="finite"):
        reinforce_plus_plus_advantages(torch.tensor([float("nan"), 0.0]), [1, 1], torch.tensor([True, True]))
    with pytest.raises(ValueError, match="one per trajectory"):
        reinforce_plus_plus_advantages(torch.tensor([1.0, 0.0]), [1], torch.tensor([True, True]))
