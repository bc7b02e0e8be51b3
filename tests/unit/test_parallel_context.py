"""Cutting packed sequences over context-parallel ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_megatron.data.packing import plan_packing
from spear_megatron.parallel.context import context_chunks, context_multiple, context_positions, gathered_order


@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_every_token_is_on_one_rank_and_comes_back(size: int, chunk_lengths: list[int]) -> None:
    lengths = [length * context_multiple(size) for length in chunk_lengths]
    if not sum(lengths):
        return
    offsets = [0, *itertools.accumulate(lengths)]
    parts = [context_positions(offsets, rank, size) for rank in range(size)]
    assert {len(part) for part in parts} == {offsets[-1] // size}
    joined = torch.cat(parts)
    assert joined[gathered_order(tuple(offsets), size)].tolist() == list(range(offsets[-1]))


def test_ranks_share_the_work_of_causal_attention_equally() -> None:
    offsets = (0, 32, 40, 64)
    costs = []
    for rank in range(4):
        positions = context_positions(offsets, rank, 4)
        starts = torch.tensor(offsets[:-1])[torch.searchsorted(torch.tensor(offsets), positions, right=True) - 1]
        costs.append(int((positions - starts + 1).sum()))
    assert len(set(costs)) == 1


def test_a_chunk_sees_its_sequence_up_to_its_last_token() -> None:
    chunks = context_chunks((0, 4, 12), 1, 2)
    found = [(c.queries.start, c.queries.stop, c.first_key, c.end_key) for c in chunks]
    assert found == [(0, 1, 0, 2), (1, 2, 0, 3), (2, 4, 4, 8), (4, 6, 4, 10)]


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        context_positions((0, 6), 0, 2)


def test_a_plan_counts_the_padding_of_sequences() -> None:
    plan = plan_packing([5, 6, 3], max_tokens=16, sequence_multiple=4, length_multiple=4)
    assert plan.token_length in (12, 16) and plan.sequence_multiple == 4 and len(plan.bins) == 2
    with pytest.raises(ValueError, match="A row of 20 tokens"):
        plan_packing([17], max_tokens=19, sequence_multiple=4, length_multiple=4)
