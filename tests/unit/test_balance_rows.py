"""Balance: every rank gets the same amount of work, decided from the index alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.data.balance import assign, causal_flops, imbalance, mini_batches, partition


def agent_lengths(count: int, seed: int) -> list[int]:
    """Log-normal response lengths with a share at the limit, like multi-turn agents with tools have."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(7.3 + 0.8 * torch.randn(count, generator=generator)).clamp(64, 16384)
    lengths[torch.rand(count, generator=generator) < 0.04] = 16384
    return [int(length) for length in lengths]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 9))
def test_partition_keeps_every_item_and_is_near_the_mean(costs: list[int], parts: int) -> None:
    result = partition(costs, parts)
    assert len(result) == parts
    assert sorted(i for part in result for i in part) == list(range(len(costs)))
    loads = [sum(costs[i] for i in part) for part in result]
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_agent_lengths_are_balanced_within_five_percent(num_ranks: int) -> None:
    lengths = agent_lengths(2048, seed=num_ranks)
    mini_batch_of_row = mini_batches([(1, i // 16) for i in range(2048)], 64)
    owner = assign(lengths, mini_batch_of_row, num_ranks)
    for mini_batch in sorted(set(mini_batch_of_row)):
        members = [i for i in range(2048) if mini_batch_of_row[i] == mini_batch]
        assert imbalance([lengths[i] for i in members], [owner[i] for i in members], num_ranks) <= 0.05
    assert imbalance(lengths, owner, num_ranks) <= 0.05


def test_small_mini_batches_keep_within_five_percent_in_total() -> None:
    """Where one mini-batch is too small to be even, the ranks' totals still are."""
    lengths = agent_lengths(256, seed=3)
    owner = assign(lengths, [i // 32 for i in range(256)], 4)
    assert imbalance(lengths, owner, 4) <= 0.05


def test_flops_weigh_long_rows_more() -> None:
    lengths = [16000, 8000, 8000, 100, 100]
    costs = [causal_flops(length, hidden_size=5120, num_parameters_per_layer=480_000_000) for length in lengths]
    assert costs[0] > 2 * costs[1]
    assert costs[1] == pytest.approx(2 * 480e6 * 8000 + 2 * 5120 * 8000.0**2)
    owner = assign(costs, [0] * 5, 2)
    assert owner[1] == owner[2] != owner[0]
    assert imbalance(costs, owner, 2) < 0.1


def test_the_answer_is_a_pure_function_and_spreads_ties() -> None:
    lengths = [100] * 12
    first = assign(lengths, [i // 4 for i in range(12)], 4)
    assert first == assign(lengths, [i // 4 for i in range(12)], 4)
    assert sorted(first[:4]) == [0, 1, 2, 3]


def test_fewer_rows_than_ranks_leaves_some_with_nothing() -> None:
    assert len(set(assign([5, 7], [0, 0], 4))) == 2
    assert assign([], [], 4) == []
    assert imbalance([], [], 4) == 0.0 and not math.isnan(imbalance([0.0], [0], 2))


def test_mini_batches_follow_group_ids_not_positions() -> None:
    groups = [(1, 9), (1, 0), (1, 4), (1, 0), (1, 2)]
    assert mini_batches(groups, 2) == [1, 0, 1, 0, 0]


def test_lengths_and_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="one cost per row"):
        assign([1, 2], [0], 2)
