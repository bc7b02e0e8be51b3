"""Replay decisions against slow references: who enters, who leaves, when and what is replayed."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections import Counter
from typing import Any

import pytest

from spear_megatron.algorithms.recalibration import GroupStatistics
from spear_megatron.parallel.seeds import derive_key
from spear_megatron.replay.config import ReplayConfig
from spear_megatron.replay.decisions import ReplayRules, rejection, select, split_evicted, split_expired
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.types import RewardParts, TrajectoryId

OFFICIAL: dict[str, Any] = {
    "require": "tool_call", "trigger_ratio": 1.5, "trigger_count": "qualifying", "capacity_ratio": 0.0,
    "power_of_two": True, "after_use": "clear", "staleness": "released", "recompose": "stored",
}  # fmt: skip
RULE_NAMES = {field.name for field in dataclasses.fields(ReplayRules)} - {"replay"}


def rules(**keys: Any) -> ReplayRules:
    """Keys of ReplayRules and of ReplayConfig alike."""
    values: dict[str, Any] = {
        "buffer_size": 8, "score_threshold": 0.0, "tolerate_steps": 5, "weight_decay": -1.0, "norm_by_std": False,
    }  # fmt: skip
    values |= {name: value for name, value in keys.items() if name in RULE_NAMES}
    replay = ReplayConfig(**{name: value for name, value in keys.items() if name not in RULE_NAMES})
    return ReplayRules(**values, replay=replay)


def entry(step: int = 1, task: int = 0, sample: int = 0, *, base: float = 1.0, bonus: float = 0.0, **keys: Any) -> Any:
    values: dict[str, Any] = {
        "shard": 0, "parts": RewardParts(base, success=True), "stored_reward": base + bonus, "advantage": 0.5,
        "num_tokens": 10, "num_sampled": 5, "num_bytes": 100, "temperature": 1.0,
    }  # fmt: skip
    return ReplayEntry(id=TrajectoryId(step, task, sample), base=base, bonus=bonus, **{**values, **keys})


def entries_of(count: int, *, step: int = 1, **keys: Any) -> tuple[ReplayEntry, ...]:
    return tuple(entry(step, task, **keys) for task in range(count))


@pytest.mark.parametrize(
    "advantage,success,turns,require,expected",
    [
        (0.5, False, 0, "none", None),
        (0.5, True, 0, "success", None),
        (0.5, False, 9, "success", "requirement"),
        (0.5, False, 1, "tool_call", None),
        (0.5, True, 0, "tool_call", "requirement"),
        (0.25, True, 1, "success", "advantage"),  # the threshold itself is not enough
        (-1.0, False, 0, "success", "advantage"),  # the first rule names it
        (math.nan, True, 1, "none", "advantage"),
    ],
)
def test_who_may_enter(advantage: float, success: bool, turns: int, require: str, expected: str | None) -> None:
    parts = RewardParts(1.0, success=success, num_tool_turns=turns)
    item = entry(advantage=advantage, parts=parts)
    assert rejection(item, rules(score_threshold=0.25, require=require)) == expected


def test_exact_staleness_keeps_up_to_the_tolerance() -> None:
    items = tuple(entry(step) for step in range(1, 11))
    kept, expired = split_expired(items, 12, None, rules(tolerate_steps=4))
    assert [item.step for item in kept] == [8, 9, 10]
    assert [item.step for item in expired] == [1, 2, 3, 4, 5, 6, 7]
    assert split_expired(items, 10, 1, rules(tolerate_steps=0))[0] == items[-1:]


@pytest.mark.parametrize("tolerance,oldest", [(3, 12), (10, 5), (50, 5)])
def test_released_staleness_is_capped_and_counts_from_the_last_push(tolerance: int, oldest: int) -> None:
    items = tuple(entry(step) for step in range(1, 16))
    rule = rules(tolerate_steps=tolerance, staleness="released")
    kept, expired = split_expired(items, 99, 15, rule)
    assert [item.step for item in kept] == list(range(oldest, 16)) and len(kept) + len(expired) == 15
    assert split_expired(items, 99, None, rule) == (items, ())


def test_released_staleness_holds_tolerance_plus_two_steps() -> None:
    rule, held, last = rules(staleness="released"), (), None
    for step in range(1, 30):  # the released code's loop: expire, then push
        held, _ = split_expired(held, step, last, rule)
        held, last = (*held, entry(step)), step
    assert [item.step for item in held] == list(range(23, 30))  # tolerance 5: seven steps


@pytest.mark.parametrize(
    "ratio,size,bound", [(1.0, 3, 3), (0.5, 7, 3), (2.0, 3, 6), (0.0, 3, 50), (0.29, 100, 29), (0.1, 3, 1)]
)
def test_capacity_in_trajectories(ratio: float, size: int, bound: int) -> None:
    items = entries_of(50)
    kept, evicted = split_evicted(items, rules(buffer_size=size, capacity_ratio=ratio, trigger_ratio=0))
    assert kept == items[-bound:] and evicted == items[: 50 - bound]


def test_a_buffer_full_to_an_equal_capacity_is_triggered() -> None:
    items = entries_of(500)
    for percent in range(1, 231):
        for size in (10, 50, 100, 200):
            if percent * size % 100 == 0:
                ratio = percent / 100
                rule = rules(buffer_size=size, capacity_ratio=ratio, trigger_ratio=ratio)
                kept, _ = split_evicted(items, rule)
                assert len(kept) == percent * size // 100
                assert select(kept, [], rule, step=2, mu=0, batch_size=1, seed=0).triggered, (ratio, size)


def test_capacity_in_bytes_drops_whole_trajectories_oldest_first() -> None:
    draw = random.Random(0)
    for _ in range(300):
        items = tuple(entry(1, task, num_bytes=draw.randrange(1, 2000)) for task in range(draw.randrange(20)))
        limit = draw.randrange(1, 8000)
        kept, evicted = split_evicted(items, rules(buffer_size=12, max_gib=limit / 2**30))
        slow = list(items)
        while len(slow) > 12 or sum(item.num_bytes for item in slow) > limit:
            slow.pop(0)
        assert kept == tuple(slow) and evicted + kept == items


@pytest.mark.parametrize(
    "count,ratio,triggered", [(7, 1.0, False), (8, 1.0, True), (0, 0.0, False), (1, 0.0, True), (3, 0.5, False)]
)
def test_trigger_by_stored_trajectories(count: int, ratio: float, triggered: bool) -> None:
    picked = select(entries_of(count), [], rules(trigger_ratio=ratio), step=2, mu=0.0, batch_size=4, seed=0)
    assert picked.triggered is triggered and (picked.num_stored, picked.num_qualifying) == (count, 0)
    assert picked.p50 is None if count == 0 else picked.p50 == 1.0


@pytest.mark.parametrize("qualifying,triggered,replayed", [(12, False, 0), (13, True, 8), (40, True, 8)])
def test_official_counts(qualifying: int, triggered: bool, replayed: int) -> None:
    """N_D 8: more than 12 must qualify; then the largest power of two of them, at most N_D."""
    items = (*entries_of(qualifying), *entries_of(30, step=2, base=-1.0))
    flat = [GroupStatistics.of([0.0], [0.0], 0.0)]
    picked = select(items, flat, rules(**OFFICIAL), step=3, mu=0.0, batch_size=8, seed=0)
    assert (picked.triggered, len(picked.chosen), picked.num_non_positive) == (triggered, replayed, 30)


@pytest.mark.parametrize(
    "count,size,expected", [(0, 99, 0), (1, 99, 0), (2, 99, 2), (63, 99, 32), (64, 99, 64), (200, 99, 99)]
)
def test_power_of_two(count: int, size: int, expected: int) -> None:
    flat = [GroupStatistics.of([0.0], [0.0], 0.0)]
    rule = rules(buffer_size=size, power_of_two=True, trigger_ratio=0.0)
    assert len(select(entries_of(count), flat, rule, step=2, mu=0.0, batch_size=500, seed=0).chosen) == expected


def test_decay_mode_multiplies_the_stored_advantage_and_filters_nothing() -> None:
    items = (entry(1, 0, advantage=0.5, base=-9.0), entry(1, 1, advantage=2.0))
    picked = select(items, [], rules(weight_decay=0.5, trigger_ratio=0), step=9, mu=0.0, batch_size=9, seed=0)
    assert [item.advantage for item in picked.chosen] == [0.25, 1.0] and picked.num_non_positive == 0
    for off in (0.0, -1.0, 1.5):
        assert not rules(weight_decay=off).decays


def test_rewards_and_baseline_at_todays_coefficient_or_as_stored() -> None:
    item = entry(base=1.0, bonus=0.5, stored_reward=1.5)
    groups = [GroupStatistics.of([1.0, -1.0], [0.5, 0.1], 1.0)]  # mean 0 + 0.3 mu
    keys: dict[str, Any] = {"step": 5, "mu": 0.2, "batch_size": 1, "seed": 0}
    today = select((item,), groups, rules(trigger_ratio=0), **keys)
    stored = select((item,), groups, rules(trigger_ratio=0, recompose="stored"), **keys)
    assert (today.p50, today.chosen[0].reward) == pytest.approx((0.06, 1.1))
    assert today.chosen[0].advantage == pytest.approx(1.04)
    assert (stored.p50, stored.chosen[0].reward) == pytest.approx((0.3, 1.5))
    assert stored.chosen[0].advantage == pytest.approx(1.2)
    scaled = select((item,), groups, rules(trigger_ratio=0, norm_by_std=True), **keys)
    assert scaled.p50_std == pytest.approx(statistics.stdev([1.1, -0.98]))
    assert scaled.chosen[0].advantage == pytest.approx(1.04 / (statistics.stdev([1.1, -0.98]) + 1e-6))


def test_a_trajectory_at_the_median_does_not_qualify() -> None:
    flat = [GroupStatistics.of([1.0], [0.0], 0.0)]
    picked = select(entries_of(3), flat, rules(trigger_ratio=0), step=2, mu=0.0, batch_size=9, seed=0)
    assert picked.chosen == () and picked.num_non_positive == 3 and picked.triggered


def test_paper_never_chooses_a_failed_trajectory() -> None:
    draw = random.Random(1)
    rule = rules(buffer_size=10)
    for step in range(2, 200):
        candidates = [
            entry(1, task, base=draw.choice([-1.0, 1.0]), bonus=draw.random(), advantage=draw.uniform(-1, 1),
                  parts=RewardParts(0.0, success=draw.random() < 0.5, num_tool_turns=3))
            for task in range(40)
        ]  # fmt: skip
        stored = tuple(item for item in candidates if rejection(item, rule) is None)
        picked = select(stored, [], rule, step=step, mu=1.0, batch_size=10, seed=0)
        assert all(item.entry.parts.success and item.entry.advantage > 0 for item in picked.chosen)


def reference(items: list[ReplayEntry], groups: list[Any], rule: ReplayRules, step: int, mu: float, size: int) -> Any:
    """The whole of ``select``, slowly: from the members of the groups themselves."""
    stored = rule.replay.recompose == "stored"

    def shaped(base: float, bonus: float, then: float) -> float:
        return base + (then if stored else mu) * bonus

    means, stds = [], []
    for then, members in groups:
        rewards = [shaped(base, bonus, then) for base, bonus in members]
        means.append(statistics.fmean(rewards))
        stds.append(statistics.stdev(rewards) if len(rewards) > 1 else 0.0)
    rewards = {item.id: item.stored_reward if stored else item.base + mu * item.bonus for item in items}
    p50 = statistics.median(means) if means else (statistics.fmean(rewards.values()) if rewards else None)
    alone = statistics.stdev(rewards.values()) if len(rewards) > 1 else 0.0
    median = statistics.median(stds) if stds else alone
    scale = median + 1e-6 if rule.norm_by_std and median else 1.0
    if 0 < rule.weight_decay <= 1:
        judged = {item.id: rule.weight_decay * item.advantage for item in items}
        good = [key for key in judged if judged[key] > 0]
    else:
        judged = {key: (reward - p50) / scale for key, reward in rewards.items()}
        good = [key for key in judged if judged[key] > 0]
    ratio = rule.replay.trigger_ratio * rule.buffer_size
    ready = len(good) > ratio if rule.replay.trigger_count == "qualifying" else len(items) >= ratio and len(items) > 0
    count = min(size, len(good))
    if rule.replay.power_of_two:
        power = 1
        while power * 2 <= len(good):
            power *= 2
        count = min(0 if len(good) < 2 else power, rule.buffer_size, size)
    draws = {key: derive_key(5, "replay", step, *key) for key in good}
    if rule.replay.sampling == "prioritized":
        ranked = sorted(good, key=lambda key: -(((draws[key] + 1) / 2**64) ** (1 / max(judged[key], 1e-12))))
    else:
        ranked = sorted(good, key=lambda key: draws[key])
    chosen = sorted(ranked[:count]) if ready else []
    return p50, len(good), ready, [(key, judged[key], rewards[key]) for key in chosen]


def test_select_equals_the_slow_reference() -> None:
    draw = random.Random(2)
    seen: Counter[str] = Counter()
    for _ in range(600):
        rule = rules(
            buffer_size=draw.randrange(1, 30),
            weight_decay=draw.choice([-1.0, -1.0, 0.7]),
            norm_by_std=draw.random() < 0.4,
            trigger_ratio=draw.choice([0.0, 0.5, 1.0]),
            capacity_ratio=0.0,
            trigger_count=draw.choice(["stored", "qualifying"]),
            power_of_two=draw.random() < 0.3,
            recompose=draw.choice(["today", "stored"]),
            sampling=draw.choice(["uniform", "prioritized"]),
        )
        groups = []
        for _ in range(draw.randrange(8)):
            members = [(draw.choice([-1.0, 0.3, 1.0]), draw.randrange(11) / 10) for _ in range(draw.randrange(1, 6))]
            groups.append((draw.random(), members))
        items = [
            entry(draw.randrange(1, 9), task, draw.randrange(8), base=draw.uniform(-1, 2), bonus=draw.random(),
                  stored_reward=draw.uniform(-1, 2), advantage=draw.uniform(0.5, 2))
            for task in range(draw.randrange(40))
        ]  # fmt: skip
        items.sort(key=lambda item: item.id)
        step, mu, size = draw.randrange(9, 30), draw.random(), draw.randrange(1, 20)
        baseline = [GroupStatistics.of(*map(list, zip(*members, strict=True)), then) for then, members in groups]
        picked = select(tuple(items), baseline, rule, step=step, mu=mu, batch_size=size, seed=5)
        p50, good, ready, chosen = reference(items, groups, rule, step, mu, size)
        assert picked.p50 == (None if p50 is None else pytest.approx(p50, abs=1e-12))
        assert (picked.num_stored, picked.num_qualifying, picked.triggered) == (len(items), good, ready)
        assert [item.entry.id for item in picked.chosen] == [key for key, _, _ in chosen]
        figures = [value for item in picked.chosen for value in (item.advantage, item.reward)]
        assert figures == pytest.approx([value for _, *both in chosen for value in both], rel=1e-6)
        seen.update(ready=ready, chosen=bool(chosen), idle=not ready)
    assert min(seen.values()) > 80


def test_uniform_sampling_is_uniform_and_shards_do_not_matter() -> None:
    items = (*entries_of(10), *entries_of(10, step=2, base=5.0))
    groups = [GroupStatistics.of([0.0], [0.0], 0.0)]
    counts: Counter[TrajectoryId] = Counter()
    for step in range(1, 2001):
        picked = select(items, groups, rules(trigger_ratio=0), step=step, mu=0.0, batch_size=5, seed=3)
        counts.update(item.entry.id for item in picked.chosen)
    expected = 2000 * 5 / 20
    chi_square = sum((counts[item.id] - expected) ** 2 / (expected * (1 - 5 / 20)) for item in items) * 19 / 20
    assert chi_square < 43.8  # 0.999 quantile at 19 degrees of freedom
    moved = tuple(dataclasses.replace(item, shard=item.id.task % 4) for item in items)
    again = select(moved, groups, rules(trigger_ratio=0), step=2000, mu=0.0, batch_size=5, seed=3)
    assert [item.entry.id for item in again.chosen] == [item.entry.id for item in picked.chosen]
    other = select(items, groups, rules(trigger_ratio=0), step=2000, mu=0.0, batch_size=5, seed=4)
    assert other.chosen != picked.chosen


def test_prioritized_sampling_follows_the_weights() -> None:
    weights = [0.1, 0.5, 1.0, 2.0, 6.4]
    items = tuple(entry(1, task, base=weight) for task, weight in enumerate(weights))
    groups = [GroupStatistics.of([0.0], [0.0], 0.0)]
    rule = rules(trigger_ratio=0, sampling="prioritized")

    def inclusions(size: int) -> list[int]:
        counts: Counter[int] = Counter()
        for step in range(3000):
            picked = select(items, groups, rule, step=step, mu=0.0, batch_size=size, seed=3)
            counts.update(item.entry.id.task for item in picked.chosen)
        return [counts[task] for task in range(len(weights))]

    for count, weight in zip(inclusions(1), weights, strict=True):
        share = weight / sum(weights)  # of one draw: proportional to the weight
        assert abs(count - 3000 * share) < 4 * math.sqrt(3000 * share * (1 - share)) + 1
    assert inclusions(2) == sorted(inclusions(2)) and inclusions(5) == [3000] * 5


def test_entries_survive_encoding() -> None:
    item = entry(3, 4, 5, base=0.1, bonus=0.7, parts=RewardParts(1.0, 3, -0.1, True, 2, 1), shard=2)
    assert ReplayEntry.decode(item.encode()) == item
    with pytest.raises((KeyError, TypeError)):
        ReplayEntry.decode({**item.encode(), "unknown": 1})
