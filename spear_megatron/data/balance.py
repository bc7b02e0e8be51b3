"""Sharing rows out over data-parallel ranks: a pure function of the index, the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence


def mini_batches(group_of_row: Sequence[Hashable], groups_per_mini_batch: int) -> list[int]:
    """Mini-batch of every row: consecutive task groups in id order, ``ppo_mini_batch_size`` groups each.

    Args:
        group_of_row: sortable group id of every row.
        groups_per_mini_batch: prompts of one optimizer step; the last mini-batch takes what remains.
    """
    rank_of = {group: rank for rank, group in enumerate(sorted(set(group_of_row)))}  # type: ignore[type-var]
    return [rank_of[group] // groups_per_mini_batch for group in group_of_row]


def causal_flops(length: int, *, hidden_size: int, num_parameters_per_layer: int) -> float:
    """Relative compute of one row: weight matrices grow with its length, causal attention with its square.

    2 FLOPs per parameter and token, and 2 * hidden_size * length per token for scores and values under a causal mask.
    """
    return 2.0 * num_parameters_per_layer * length + 2.0 * hidden_size * float(length) ** 2


def assign(costs: Sequence[float], mini_batch_of_row: Sequence[int], num_ranks: int) -> list[int]:
    """Data-parallel rank of every row, with equal total cost on every rank inside each mini-batch.

    Karmarkar-Karp differencing per mini-batch; of the resulting parts the costliest goes to the rank with the least
    cost so far. Ties are broken by position, so rows sorted by id give one answer wherever they were born.

    Args:
        costs: cost of every row in id order: its packed length, or ``causal_flops`` of it.
        mini_batch_of_row: mini-batch of every row.
        num_ranks: data-parallel size.

    Returns:
        One rank per row.

    Raises:
        ValueError: the sequences differ in length or ``num_ranks`` is not positive.
    """
    if len(costs) != len(mini_batch_of_row) or num_ranks < 1:
        raise ValueError(
            f"{len(costs)} costs for {len(mini_batch_of_row)} rows on {num_ranks} ranks: give one cost per row."
        )
    owner = [0] * len(costs)
    totals = [0.0] * num_ranks
    for mini_batch in sorted(set(mini_batch_of_row)):
        members = [i for i, number in enumerate(mini_batch_of_row) if number == mini_batch]
        parts = partition([costs[i] for i in members], num_ranks)
        parts.sort(key=lambda part: (-sum(costs[members[i]] for i in part), part))
        ranks = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for part, rank in zip(parts, ranks, strict=True):
            for i in part:
                owner[members[i]] = rank
                totals[rank] += costs[members[i]]
    return owner


def partition(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Split items into ``num_parts`` lists (some may be empty) of nearly equal total cost.

    Largest differencing method (Karmarkar and Karp, 1982): the two partial solutions with the largest spread are
    merged, heaviest part of one with the lightest of the other, until one remains.
    """
    # A partial solution is (-spread, tie break, parts by descending load); an item alone is one with one filled part.
    Parts = list[tuple[float, list[int]]]
    heap: list[tuple[float, int, Parts]] = []
    for i, cost in enumerate(costs):
        parts: Parts = [(float(cost), [i])] + [(0.0, [])] * (num_parts - 1)
        heap.append((-float(cost), i, parts))
    heapq.heapify(heap)
    if not heap:
        return [[] for _ in range(num_parts)]
    while len(heap) > 1:
        _, tie, first = heapq.heappop(heap)
        _, other_tie, second = heapq.heappop(heap)
        pairs = zip(first, reversed(second), strict=True)
        sums = [(a + b, left + right) for (a, left), (b, right) in pairs]
        merged = sorted(sums, key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], min(tie, other_tie), merged))
    return [sorted(items) for _, items in heap[0][2]]


def imbalance(costs: Sequence[float], owner: Sequence[int], num_ranks: int) -> float:
    """Costliest rank over the mean, minus 1; 0 for no cost at all."""
    totals = [0.0] * num_ranks
    for cost, rank in zip(costs, owner, strict=True):
        totals[rank] += cost
    mean = sum(totals) / num_ranks
    return max(totals) / mean - 1.0 if mean > 0 else 0.0
