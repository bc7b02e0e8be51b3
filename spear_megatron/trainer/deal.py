"""Which rank trains on what, and in which optimizer step: a pure function of the index, the same on every rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from spear_megatron.data.balance import assign, imbalance, mini_batches, partition
from spear_megatron.data.index import IndexRow
from spear_megatron.data.packing import RowKey
from spear_megatron.types import TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """Mini-batch and data-parallel rank of every row of a step, and of every replayed trajectory.

    Attributes:
        mini_batch_of, owner_of: by row, (trajectory, segment).
        replay_mini_batch_of, replay_owner_of: by replayed trajectory, whose segments stay together.
        imbalance: largest load of a rank over the mean, minus 1.
    """

    mini_batch_of: Mapping[RowKey, int] = field(default_factory=dict)
    owner_of: Mapping[RowKey, int] = field(default_factory=dict)
    replay_mini_batch_of: Mapping[TrajectoryId, int] = field(default_factory=dict)
    replay_owner_of: Mapping[TrajectoryId, int] = field(default_factory=dict)
    imbalance: float = 0.0

    @property
    def numbers(self) -> list[int]:
        """Mini-batches in order; those that hold replayed trajectories alone come last."""
        return sorted({*self.mini_batch_of.values(), *self.replay_mini_batch_of.values()})


def plan_deal(
    index: Sequence[IndexRow],
    masked: Collection[TrajectoryId],
    replayed: Mapping[TrajectoryId, int],
    *,
    groups_per_mini_batch: int,
    rows_per_mini_batch: int,
    num_ranks: int,
    update: Literal["joint", "separate"],
) -> Deal:
    """Deal the step's rows and replayed trajectories, equal by tokens on every rank inside each mini-batch.

    Args:
        index: trajectories to train on, sorted by id. A row without a sampled token, or of a ``masked`` trajectory,
            costs nothing, but stays: it counts where a loss is a mean over rows.
        replayed: tokens of every replayed trajectory.
        groups_per_mini_batch: task groups of one mini-batch.
        rows_per_mini_batch: trajectories of one mini-batch of replayed ones alone (``separate``).
        update: joint deals the replayed trajectories once over the step's mini-batches, equal by tokens; separate
            lets mini-batches of their own follow, in id order. Without any row to train on, nothing is replayed.
    """
    keys: list[RowKey] = []
    costs: list[float] = []
    for row in index:
        for segment, (length, sampled) in enumerate(zip(row.segment_lengths, row.sampled_lengths, strict=True)):
            keys.append((row.id, segment))
            costs.append(float(length) if sampled and row.id not in masked else 0.0)
    if not keys:
        return Deal()
    numbers = mini_batches([key[0].group for key in keys], groups_per_mini_batch)
    names = sorted(replayed)
    tokens = [float(replayed[name]) for name in names]
    if update == "joint":
        replay_numbers = [0] * len(names)
        for number, part in enumerate(partition(tokens, max(numbers) + 1)):
            for position in part:
                replay_numbers[position] = number
    else:
        replay_numbers = [max(numbers) + 1 + position // rows_per_mini_batch for position in range(len(names))]
    owners = assign(costs + tokens, numbers + replay_numbers, num_ranks)
    return Deal(
        mini_batch_of=dict(zip(keys, numbers, strict=True)),
        owner_of=dict(zip(keys, owners, strict=False)),
        replay_mini_batch_of=dict(zip(names, replay_numbers, strict=True)),
        replay_owner_of=dict(zip(names, owners[len(keys) :], strict=True)),
        imbalance=imbalance(costs + tokens, owners, num_ranks),
    )
