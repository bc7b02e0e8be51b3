"""Every decision about replay: pure functions of the index, the baseline, the step and the seed.

None of them reads ``ReplayEntry.shard``, so the decisions are the same on every rank and for every number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spear_megatron.algorithms.moments import deviations
from spear_megatron.algorithms.recalibration import GroupStatistics, percentile, recalibrated_advantage
from spear_megatron.algorithms.rounding import floor_share, share
from spear_megatron.parallel.seeds import derive_key
from spear_megatron.replay.config import ReplayConfig
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.types import TrajectoryId

Entries = tuple[ReplayEntry, ...]
"""Sorted by id."""

_RELEASED_TOLERANCE = 10
_BYTES_PER_GIB = 1 << 30
_UNIFORM = 2.0**-64


@dataclass(frozen=True, kw_only=True)
class ReplayRules:
    """SPEAR's own keys (``actor_rollout_ref.actor.*``) and those of ``replay.*``."""

    buffer_size: int
    score_threshold: float
    tolerate_steps: int
    weight_decay: float
    norm_by_std: bool
    replay: ReplayConfig

    @property
    def trigger(self) -> float:
        """Trajectories that the buffer must count before anything is replayed."""
        return share(self.replay.trigger_ratio, self.buffer_size)

    @property
    def capacity(self) -> int | None:
        """Most trajectories that are kept, at least one; None without a bound."""
        if self.replay.capacity_ratio == 0:
            return None
        return max(floor_share(self.replay.capacity_ratio, self.buffer_size), 1)

    @property
    def decays(self) -> bool:
        """Whether stored advantages are multiplied by ``weight_decay`` instead of recalibrated."""
        return 0.0 < self.weight_decay <= 1.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A trajectory to replay with its recalibrated ``advantage``, and its ``reward`` at the step's coefficient."""

    entry: ReplayEntry
    advantage: float
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySelection:
    """What is replayed in one step.

    Attributes:
        chosen: sorted by id.
        p50, p50_std: the baseline; None without any recorded group or stored trajectory.
        num_stored, num_qualifying, num_non_positive: trajectories considered, and how the second filter split them.
        triggered: whether the buffer reached its trigger.
    """

    step: int
    chosen: tuple[Chosen, ...] = ()
    p50: float | None = None
    p50_std: float | None = None
    num_stored: int = 0
    num_qualifying: int = 0
    num_non_positive: int = 0
    triggered: bool = False


def rejection(entry: ReplayEntry, rules: ReplayRules) -> str | None:
    """Rule that keeps a valid, unfiltered trajectory out of the buffer: advantage or requirement; None to push it."""
    if not entry.advantage > rules.score_threshold:
        return "advantage"
    needed = rules.replay.require
    missing = (needed == "success" and not entry.parts.success) or (
        needed == "tool_call" and entry.parts.num_tool_turns < 1
    )
    return "requirement" if missing else None


def split_expired(
    entries: Entries, step: int, last_push_step: int | None, rules: ReplayRules
) -> tuple[Entries, Entries]:
    """(kept, expired): what is too old at ``step``.

    The released code caps the tolerance at 10 and counts from the last step that pushed anything, before each push.
    """
    if rules.replay.staleness == "exact":
        oldest = step - rules.tolerate_steps
    elif last_push_step is None:
        return entries, ()
    else:
        oldest = last_push_step - min(rules.tolerate_steps, _RELEASED_TOLERANCE)
    return tuple(e for e in entries if e.step >= oldest), tuple(e for e in entries if e.step < oldest)


def split_evicted(entries: Entries, rules: ReplayRules) -> tuple[Entries, Entries]:
    """(kept, evicted): the oldest leave until the bounds in trajectories and bytes hold."""
    bound = len(entries) if rules.capacity is None else rules.capacity
    max_bytes = int(rules.replay.max_gib * _BYTES_PER_GIB)
    first, total = len(entries), 0
    while first > 0 and len(entries) - first < bound and total + entries[first - 1].num_bytes <= max_bytes:
        first -= 1
        total += entries[first].num_bytes
    return entries[first:], entries[:first]


def select(
    entries: Entries,
    baseline: Sequence[GroupStatistics],
    rules: ReplayRules,
    *,
    step: int,
    mu: float,
    batch_size: int,
    seed: int,
) -> ReplaySelection:
    """Choose what to replay at ``step``.

    Args:
        baseline: D_R, the latest group means.
        mu: today's tool-call coefficient.
        batch_size: most trajectories to choose.
    """
    coefficient = mu if rules.replay.recompose == "today" else None
    p50, p50_std = _baseline(entries, baseline, coefficient)
    judged = [_judged(entry, coefficient, p50, p50_std, rules) for entry in entries]
    qualifying = [item for item in judged if item.advantage > 0]
    if rules.replay.trigger_count == "stored":
        triggered = len(entries) >= max(rules.trigger, 1)
    else:
        triggered = len(qualifying) > rules.trigger
    chosen = _sample(qualifying, rules, step=step, batch_size=batch_size, seed=seed) if triggered else ()
    return ReplaySelection(
        step=step,
        chosen=chosen,
        p50=p50,
        p50_std=p50_std,
        num_stored=len(entries),
        num_qualifying=len(qualifying),
        num_non_positive=len(entries) - len(qualifying),
        triggered=triggered,
    )


def _baseline(
    entries: Entries, baseline: Sequence[GroupStatistics], mu: float | None
) -> tuple[float | None, float | None]:
    if baseline:
        return percentile([part.mean(mu) for part in baseline], 50), percentile([part.std(mu) for part in baseline], 50)
    if not entries:
        return None, None
    rewards = [entry.reward(mu) for entry in entries]
    return math.fsum(rewards) / len(rewards), deviations(rewards)[1]


def _judged(
    entry: ReplayEntry, mu: float | None, p50: float | None, p50_std: float | None, rules: ReplayRules
) -> Chosen:
    reward = entry.reward(mu)
    if rules.decays:
        return Chosen(entry, rules.weight_decay * entry.advantage, reward)
    assert p50 is not None
    return Chosen(entry, recalibrated_advantage(reward, p50, p50_std if rules.norm_by_std else None), reward)


def _sample(
    qualifying: Sequence[Chosen], rules: ReplayRules, *, step: int, batch_size: int, seed: int
) -> tuple[Chosen, ...]:
    count = min(batch_size, len(qualifying))
    if rules.replay.power_of_two:
        count = min(_power_of_two(len(qualifying)), rules.buffer_size, batch_size)

    def order(item: Chosen) -> tuple[float, TrajectoryId]:
        key = derive_key(seed, "replay", step, *item.entry.id)
        if rules.replay.sampling == "uniform":
            return key, item.entry.id
        # Efraimidis and Spirakis (2006): the largest u^(1/w), that is the smallest -log(u) / w.
        return -math.log((key + 1) * _UNIFORM) / max(item.advantage, 1e-12), item.entry.id

    return tuple(sorted(sorted(qualifying, key=order)[:count], key=lambda item: item.entry.id))


def _power_of_two(count: int) -> int:
    return 0 if count <= 1 else 1 << (count.bit_length() - 1)
