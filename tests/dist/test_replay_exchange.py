"""Self-imitation on real ranks: one selection and the same replayed rows on every layout, also after a kill."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks

from spear_megatron.data.balance import assign
from spear_megatron.data.files import FileEntry
from spear_megatron.data.index import index_row
from spear_megatron.parallel.state import ParallelState, initialize
from spear_megatron.replay.buffer import ReplayBuffer
from spear_megatron.replay.config import ReplayConfig
from spear_megatron.replay.decisions import ReplayRules
from spear_megatron.rollout.collect import Collected
from spear_megatron.trainer.imitation import Imitation, Replayed
from spear_megatron.trainer.scoring import Scores
from spear_megatron.types import Group, Prompt, RewardParts, Row, Segment, StopReason, Trajectory, TrajectoryId

TASKS, SAMPLES, LAST_STEP = 5, 3, 8
WEIGHT = 0.5  # of the step term
LAYOUTS = [(2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 1)]


def mu_of(step: int) -> float:
    return 1.0 / step


def trajectory(step: int, task: int, sample: int) -> Trajectory:
    draw = random.Random(f"{step}/{task}/{sample}")
    segments = []
    for _ in range(draw.randrange(1, 4)):
        n = draw.randrange(2, 9)
        versions = torch.full((n,), step - 1, dtype=torch.int32)
        ids = torch.tensor([draw.randrange(99) for _ in range(n)], dtype=torch.int32)
        segments.append(Segment(ids, torch.arange(n) > 0, -torch.rand(n, generator=seeded(draw)), "door", versions))
    success = draw.random() < 0.6
    parts = RewardParts(1.0 if success else -1.0, draw.randrange(4), success=success, num_tool_turns=1)
    failed = draw.random() < 0.1
    reason = StopReason.INFRASTRUCTURE if failed else StopReason.ANSWER
    return Trajectory(TrajectoryId(step, task, sample), tuple(segments), parts, reason, step - 1)


def seeded(draw: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(draw.randrange(2**31))


def old_log_probs(member: Trajectory, segment: int) -> torch.Tensor:
    """What a trainer would have computed; any function of the trajectory."""
    return member.segments[segment].rollout_log_probs * 0.75 - segment - 0.001 * member.id.step


def step_term(key: TrajectoryId, segment: int) -> float:
    return 0.1 * key.sample - 0.2 * segment


def scores_of(step: int, members: list[Trajectory]) -> Scores:
    valid = [member for member in members if member.valid]
    base = {member.id: member.reward.outcome for member in valid}
    bonus = {member.id: 0.1 * member.reward.num_tool_calls for member in valid}
    rewards = {key: base[key] + mu_of(step) * bonus[key] for key in base}
    means: dict[tuple[int, int], list[float]] = {}
    for key, reward in rewards.items():
        means.setdefault(key.group, []).append(reward)
    return Scores(
        mu=mu_of(step),
        base=base,
        bonus=bonus,
        rewards=rewards,
        masked={member.id: "overlong" for member in valid if member.id.task == 4 and member.id.sample == 0},
        groups=frozenset(key.group for key in base if key.group[1] != 3),
        counted=frozenset(base),
        advantages={key: reward - sum(means[key.group]) / len(means[key.group]) for key, reward in rewards.items()},
        step_advantages={
            (member.id, segment): step_term(member.id, segment)
            for member in valid
            for segment in range(len(member.segments))
        },
    )


def imitation_of(parallel: ParallelState, run_dir: Path, after_use: str) -> Imitation:
    replay = ReplayConfig(trigger_ratio=0.25, after_use=after_use, segment_mib=0.002)  # type: ignore[arg-type]
    rules = ReplayRules(
        buffer_size=16, score_threshold=0.0, tolerate_steps=3, weight_decay=-1.0, norm_by_std=False, replay=replay
    )
    buffer = ReplayBuffer(rules, parallel, run_dir, baseline_size=12, seed=3, temperature=1.0)
    return Imitation(
        buffer=buffer, parallel=parallel, temperature=1.0, batch_size=5,
        step_term_weight=WEIGHT, baseline_groups="all",
    )  # fmt: skip


def collected_of(step: int, parallel: ParallelState) -> tuple[Collected, list[Trajectory], list[Row]]:
    """The step as this rank sees it, all its trajectories, and the rows that this data-parallel rank trains on.

    A row is trained on another rank than the one that sampled it, where there is another.
    """
    groups = [
        Group(Prompt(f"t{task}", ()), tuple(trajectory(step, task, sample) for sample in range(SAMPLES)))
        for task in range(TASKS)
    ]
    members = [member for group in groups for member in group.trajectories]
    index = [index_row(member, f"t{member.id.task}", member.id.task % parallel.dp_size) for member in members]
    own = [group for group in groups if group.id[1] % parallel.dp_size == parallel.dp_rank and parallel.is_leader]
    rows = []
    for member in members:
        for number, segment in enumerate(member.segments):
            if (member.id.task + 1 + number) % parallel.dp_size == parallel.dp_rank:
                old = old_log_probs(member, number)
                rows.append(
                    Row(
                        trajectory=member.id, segment=number, ids=segment.ids, response_mask=segment.response_mask,
                        rollout_log_probs=segment.rollout_log_probs, advantages=torch.zeros_like(old),
                        old_log_probs=old,
                    )  # fmt: skip
                )
    return Collected(own, index), members, rows


def live(tp: int, pp: int, run_dir: Path, first: int, last: int, after_use: str, saved_at: int | None) -> Any:
    """Steps ``first`` to ``last``, from the saved state if ``first`` is not 1; (dp rank, figures of every step)."""
    parallel = initialize(tp, pp, timeout_s=60)
    imitation = imitation_of(parallel, run_dir, after_use)
    state_file = run_dir / "state.json"
    if first > 1:
        saved = json.loads(state_file.read_text())
        imitation.buffer.restore(saved["state"], [FileEntry(**entry) for entry in saved["files"]])
    figures = {}
    for step in range(first, last + 1):
        imitation.begin_step()
        collected, members, rows = collected_of(step, parallel)
        scores = scores_of(step, members)
        replayed = imitation.select(step, scores.mu, 1.0, len(scores.rewards))
        names = sorted(replayed.tokens)
        owners = assign([float(replayed.tokens[key]) for key in names], [0] * len(names), parallel.dp_size)
        owner_of = dict(zip(names, owners, strict=True))
        fetched = imitation.fetch(replayed, owner_of, timeout_s=30) if names else []
        check_rows(fetched, replayed, [key for key in names if owner_of[key] == parallel.dp_rank])
        metrics = imitation.push(step, collected, scores, rows, timeout_s=30)
        index = [
            {name: value for name, value in entry.encode().items() if name != "shard"}
            for entry in imitation.buffer.entries
        ]
        rows_seen = [(row.trajectory, row.segment, row.old_log_probs.tolist()) for row in fetched]  # type: ignore
        lineage = imitation.lineage(step, scores, [])
        figures[step] = (dict(replayed.advantages), dict(replayed.metrics), metrics, index, lineage, rows_seen)
        if step == saved_at:
            state, files = imitation.snapshot()
            if parallel.rank == 0:
                state_file.write_text(json.dumps({"state": state, "files": [asdict(entry) for entry in files]}))
    return parallel.dp_rank, figures


def check_rows(rows: list[Row], replayed: Replayed, names: list[TrajectoryId]) -> None:
    """Exactly the segments of ``names``, as they were sampled and scored then."""
    members = [trajectory(*name) for name in names]
    expected = [(member.id, segment) for member in members for segment in range(len(member.segments))]
    assert [(row.trajectory, row.segment) for row in rows] == expected
    for row in rows:
        member = trajectory(*row.trajectory)
        segment = member.segments[row.segment]
        advantage = replayed.advantages[row.trajectory] + WEIGHT * step_term(row.trajectory, row.segment)
        assert torch.equal(row.ids, segment.ids) and torch.equal(row.response_mask, segment.response_mask)
        assert torch.equal(row.rollout_log_probs, segment.rollout_log_probs)
        assert row.old_log_probs is not None
        assert torch.equal(row.old_log_probs, old_log_probs(member, row.segment))
        assert torch.allclose(row.advantages, segment.response_mask.float() * advantage)


def merged(answers: list[Any], copies: int) -> dict[int, Any]:
    """Figures by step, with the rows of all data-parallel ranks; whatever should be equal is."""
    whole = {}
    for step in answers[0][1]:
        shared = [figures[step][:-1] for _, figures in answers]
        assert all(part == shared[0] for part in shared), f"ranks differ in step {step}"
        rows_of: dict[int, list[Any]] = {}
        for dp_rank, figures in answers:
            rows_of.setdefault(dp_rank, []).append(figures[step][-1])
        assert all(len(part) == copies and all(rows == part[0] for rows in part) for part in rows_of.values())
        whole[step] = (*shared[0], sorted(row for part in rows_of.values() for row in part[0]))
    return whole


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Any]]:
    """One rank, without a kill."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for after_use in ("keep", "clear"):
        (folder / after_use).mkdir()
        found[after_use] = merged(run_ranks(live, 1, 1, 1, folder / after_use, 1, LAST_STEP, after_use, None), 1)
        steps = list(found[after_use].values())
        replayed = [len(figures[0]) for figures in steps]
        assert sum(count > 0 for count in replayed) >= 3 and max(replayed) == 5
        assert any(figures[2]["replay/expired"] + figures[2]["replay/evicted"] > 0 for figures in steps)
    return found


@pytest.mark.parametrize("world_size,tp,pp", LAYOUTS)
def test_every_layout_replays_the_same_rows(
    alone: dict[str, dict[int, Any]], tmp_path: Path, world_size: int, tp: int, pp: int
) -> None:
    answers = run_ranks(live, world_size, tp, pp, tmp_path, 1, LAST_STEP, "keep", None)
    assert merged(answers, tp * pp) == alone["keep"]


def test_the_buffer_is_cleared_alike(alone: dict[str, dict[int, Any]], tmp_path: Path) -> None:
    assert merged(run_ranks(live, 2, 1, 1, tmp_path, 1, LAST_STEP, "clear", None), 1) == alone["clear"]


def test_a_killed_run_continues_on_other_layouts(alone: dict[str, dict[int, Any]], tmp_path: Path) -> None:
    """Saved after step 4 on two ranks, killed after step 6; what the lost steps wrote stays in the files."""
    before = merged(run_ranks(live, 2, 1, 1, tmp_path, 1, 6, "keep", 4), 1)
    assert before == {step: alone["keep"][step] for step in range(1, 7)}
    rest = {step: alone["keep"][step] for step in range(5, LAST_STEP + 1)}
    for world_size, tp, pp in ((4, 2, 2), (1, 1, 1), (2, 1, 1)):
        answers = run_ranks(live, world_size, tp, pp, tmp_path, 5, LAST_STEP, "keep", None)
        assert merged(answers, tp * pp) == rest, f"{world_size} ranks, tp {tp}, pp {pp}"
