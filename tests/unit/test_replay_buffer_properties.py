"""Random lives of the replay buffer on 1 to 4 shards: one index, one selection; nothing lost, doubled, over bounds."""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_ranks import Ranks, made_up, payload_of, simulated_ranks

from spear_megatron.algorithms.recalibration import GroupStatistics
from spear_megatron.data.files import hash_file
from spear_megatron.replay.config import ReplayConfig
from spear_megatron.replay.decisions import ReplayRules
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.types import TrajectoryId

BASELINE = 5


@pytest.fixture(autouse=True, scope="module")
def ranks_are_threads() -> Iterator[None]:
    with simulated_ranks():
        yield


@st.composite
def rule_sets(draw: st.DrawFn) -> ReplayRules:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    replay = ReplayConfig(
        require=pick("success", "tool_call", "none"),
        trigger_ratio=pick(0.0, 0.5),
        trigger_count=pick("stored", "qualifying"),
        capacity_ratio=pick(0.0, 1.0),
        max_gib=pick(32.0, 700 / 2**30),
        power_of_two=pick(False, True),
        after_use=pick("keep", "keep", "clear"),
        staleness=pick("exact", "released"),
        recompose=pick("today", "stored"),
        sampling=pick("uniform", "prioritized"),
        segment_mib=pick(64.0, 1500 / 2**20),
    )
    return ReplayRules(
        buffer_size=pick(2, 6, 20), score_threshold=pick(0.0, 0.3), tolerate_steps=pick(0, 1, 3, 50),
        weight_decay=pick(-1.0, 0.5), norm_by_std=pick(False, True), replay=replay,
    )  # fmt: skip


events = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 10**6)),
        st.tuples(st.just("step"), st.integers(0, 10**6)),
        st.tuples(st.just("snapshot"), st.just(0)),
        st.tuples(st.just("restart"), st.integers(0, 10**6)),
    ),
    min_size=4,
    max_size=14,
)


class Model:
    """The buffer as a plain list, by the letter of its definition."""

    def __init__(self, rules: ReplayRules) -> None:
        self.rules = rules
        self.held: list[ReplayEntry] = []
        self.baseline: list[GroupStatistics] = []
        self.last: int | None = None

    def copy(self) -> Model:
        twin = Model(self.rules)
        twin.held, twin.baseline, twin.last = list(self.held), list(self.baseline), self.last
        return twin

    def expire(self, step: int) -> None:
        if self.rules.replay.staleness == "exact":
            self.held = [item for item in self.held if step - item.id.step <= self.rules.tolerate_steps]

    def push(self, step: int, candidates: list[ReplayEntry], groups: list[GroupStatistics]) -> None:
        if self.rules.replay.staleness == "released" and self.last is not None:
            tolerance = min(self.rules.tolerate_steps, 10)
            self.held = [item for item in self.held if self.last - item.id.step <= tolerance]
        for item in candidates:
            needed = {"success": item.parts.success, "tool_call": item.parts.num_tool_turns > 0, "none": True}
            if item.advantage > self.rules.score_threshold and needed[self.rules.replay.require]:
                self.held.append(item)
                self.last = step
        most = self.rules.buffer_size if self.rules.replay.capacity_ratio else 10**9
        while len(self.held) > most or sum(item.num_bytes for item in self.held) > self.rules.replay.max_gib * 2**30:
            self.held.pop(0)
        self.baseline = (self.baseline + groups)[-BASELINE:]


@dataclasses.dataclass
class Saved:
    step: int
    state: Any
    files: Any
    model: Model
    mu: float


class Life:
    """One history on one shard count; what it saw is ``trace``."""

    def __init__(self, size: int, rules: ReplayRules, run_dir: Path) -> None:
        self.rules, self.run_dir, self.size = rules, run_dir, size
        self.temperature = 1.0
        self.ranks = Ranks(size, run_dir, rules, baseline_size=BASELINE)
        self.model = Model(rules)
        self.step = 0
        self.saved: list[Saved] = []
        self.trace: list[Any] = []
        self.seen: Counter[str] = Counter()

    def run(self, kind: str, seed: int) -> None:
        draw = random.Random(seed)
        if kind == "step":
            self.train(draw)
        elif kind == "snapshot":
            self.snapshot()
        elif self.saved:
            self.restart(draw)
        self.check()

    def train(self, draw: random.Random) -> None:
        self.step += 1
        candidates, groups = made_up(self.step, draw, self.temperature)
        mu, size = draw.random(), draw.randrange(1, 9)
        statistics = [GroupStatistics.of(base, bonus, mu) for base, bonus in groups]
        self.select(mu, size)
        placed = [self.placed(item) for item in candidates]

        def push(buffer: Any, rank: int) -> Any:
            plan = buffer.plan_push(placed)
            own = [item for item in plan.accepted if item.shard == rank]
            payloads = {item.id: payload_of(item.id, item.num_tokens, item.temperature) for item in own}
            return buffer.push(self.step, plan, payloads, statistics)

        results = self.ranks.each(push)
        assert all(result == results[0] for result in results)
        self.trace.append(results[0])
        self.model.push(self.step, candidates, statistics)
        self.seen["evicted"] += len(results[0][1])

    def select(self, mu: float, size: int) -> None:
        expired = self.ranks.each(lambda buffer, rank: buffer.expire(self.step))
        self.model.expire(self.step)
        chosen = self.ranks.each(lambda buffer, rank: buffer.select(self.step, mu, size))
        assert all(ids == expired[0] for ids in expired) and all(pick == chosen[0] for pick in chosen)
        picked = chosen[0]
        keys = [item.entry.id for item in picked.chosen]
        assert keys == sorted(set(keys)) and len(keys) <= size
        assert set(keys) <= {item.id for item in self.model.held}
        moved = [key for buffer in self.ranks.buffers for key in buffer.payloads(keys)]
        assert sorted(moved) == keys
        figures = [(item.entry.id, item.advantage, item.reward) for item in picked.chosen]
        self.trace.append((expired[0], picked.p50, picked.p50_std, picked.num_qualifying, picked.triggered, figures))
        if keys:
            cleared = self.ranks.each(lambda buffer, rank: buffer.clear_after_use())
            assert all(ids == cleared[0] for ids in cleared)
            if self.rules.replay.after_use == "clear":
                assert set(cleared[0]) == {item.id for item in self.model.held}
                self.model.held = []
            self.seen["replayed"] += 1

    def placed(self, item: ReplayEntry) -> ReplayEntry:
        return dataclasses.replace(item, shard=(3 * item.id.task + item.id.sample + item.id.step) % self.size)

    def snapshot(self) -> None:
        results = self.ranks.each(lambda buffer, rank: buffer.snapshot())
        assert all(result == results[0] for result in results)
        state, files = results[0]
        for entry in files:
            assert hash_file(self.run_dir / entry.path, entry.num_bytes) == entry.sha256
        self.saved = [*self.saved, Saved(self.step, json.dumps(state), files, self.model.copy(), 0.5)][-2:]
        named = {entry.path for saved in self.saved for entry in saved.files}
        self.ranks.buffers[0].collect(named)
        assert all((self.run_dir / name).is_file() for name in named)

    def restart(self, draw: random.Random) -> None:
        """A kill, damage to all that no checkpoint names, and another process with another number of ranks."""
        self.ranks.close()
        if draw.random() < 0.3:
            self.saved = self.saved[:1]  # the newest checkpoint is refused
        saved = self.saved[-1]
        self.damage(random.Random(draw.random()))  # files differ among shard counts: nothing else may
        change = draw.random() < 0.2
        self.temperature = draw.choice([0.5, 1.0]) if change else self.temperature
        self.size = (self.size + draw.randrange(4) - 1) % 4 + 1
        self.step, self.model = saved.step, saved.model.copy()
        self.ranks = Ranks(
            self.size, self.run_dir, self.rules, baseline_size=BASELINE, temperature=self.temperature
        )
        counts = self.ranks.each(lambda buffer, rank: buffer.restore(json.loads(saved.state), saved.files))
        assert all(count == counts[0] for count in counts)
        same = [item for item in self.model.held if item.temperature == self.temperature]
        dropped = len(self.model.held) - len(same)
        assert counts[0] == Counter(restored=len(same), temperature=dropped)
        self.model.held = same
        self.trace.append(sorted(counts[0].items()))
        self.seen.update(restored=len(same), dropped=dropped)

    def damage(self, draw: random.Random) -> None:
        valid: dict[str, int] = {}
        for saved in self.saved:
            for entry in saved.files:
                valid[entry.path] = max(valid.get(entry.path, 0), entry.num_bytes)
        for path in sorted(self.run_dir.glob("replay/*/*")):
            keep = valid.get(str(path.relative_to(self.run_dir)), 0)
            how = draw.randrange(3)
            if how == 0 and keep == 0:
                path.unlink()
            elif how == 1:
                path.write_bytes(path.read_bytes()[:keep])
            else:
                path.write_bytes(path.read_bytes()[:keep] + b"lost" * 5)

    def check(self) -> None:
        """Every rank has the model's index and baseline, and the shards' payloads are exactly those of the index."""
        held = self.model.held
        for buffer in self.ranks.buffers:
            assert [dataclasses.replace(item, shard=0) for item in buffer.entries] == held
            assert buffer.entries == self.ranks.buffers[0].entries
            assert list(buffer.baseline) == self.model.baseline
            assert buffer.num_bytes == sum(item.num_bytes for item in held) <= self.rules.replay.max_gib * 2**30
        assert not self.rules.replay.capacity_ratio or len(held) <= self.rules.buffer_size
        everything = [item.id for item in held]
        found: list[TrajectoryId] = []
        for rank, buffer in enumerate(self.ranks.buffers):
            own = buffer.payloads(everything)
            assert list(own) == [item.id for item in buffer.entries if item.shard == rank]
            found += own
            for item in buffer.entries:
                if item.shard == rank:
                    expected = payload_of(item.id, item.num_tokens, item.temperature)
                    record = own[item.id]
                    assert dict(record.fields) == dict(expected.fields)
                    for name, tensor in expected.tensors.items():
                        assert record.tensors[name].dtype == tensor.dtype
                        assert torch.equal(record.tensors[name], tensor)
        assert sorted(found) == everything
        self.trace.append((everything, [buffer.trigger for buffer in self.ranks.buffers][:1]))


def lives(rules: ReplayRules, history: list[tuple[str, int]]) -> Counter[str]:
    """Every shard count lives the same history and sees the same."""
    traces, seen = [], Counter[str]()
    for size in (1, 2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            life = Life(size, rules, Path(folder))
            try:
                for kind, seed in history:
                    life.run(kind, seed)
            finally:
                life.ranks.close()
            traces.append(life.trace)
            seen += life.seen
    assert all(trace == traces[0] for trace in traces)
    return seen


@settings(max_examples=25, deadline=None)
@given(rule_sets(), events)
def test_all_shard_counts_live_the_same_life(rules: ReplayRules, history: list[tuple[str, int]]) -> None:
    lives(rules, history)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(rule_sets(), events)
def test_thousands_of_events(rules: ReplayRules, history: list[tuple[str, int]]) -> None:
    lives(rules, history)


def test_the_histories_reach_everything() -> None:
    draw, seen = random.Random(5), Counter[str]()
    rules = ReplayRules(
        buffer_size=6, score_threshold=0.0, tolerate_steps=3, weight_decay=-1.0, norm_by_std=False,
        replay=ReplayConfig(trigger_ratio=0.0, segment_mib=1500 / 2**20, require="none"),
    )  # fmt: skip
    for _ in range(6):
        kinds = draw.choices(["step", "snapshot", "restart"], [3, 1, 1], k=25)
        seen += lives(rules, [(kind, draw.randrange(10**6)) for kind in kinds])
    assert all(seen[name] > 20 for name in ("evicted", "replayed", "restored", "dropped"))
