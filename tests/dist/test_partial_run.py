"""Runs whose stopped groups go on in the next step, with and without rollouts ahead, and after a break."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from async_run import STEPS, arguments, break_off_on_rank, course, run_command
from harness import run_ranks

from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.observability.trajectories import read_trajectories

# Two groups of four in flight, of which the engine computes one: the second one is always stopped in its midst.
PARTIAL = (
    "actor_rollout_ref.rollout.over_sampling=1.5", "actor_rollout_ref.rollout.partial_rollout=true",
    "actor_rollout_ref.rollout.max_num_seqs=4", "algorithm.rollout_correction.mode=tis",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model"), seed=0))


def decisions(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "acceptance.jsonl").read_text().splitlines()]


def check_prompts(run_dir: Path) -> None:
    """Every prompt is accepted at most once, in the order of the stream but for those that still wait."""
    lines = {line["step"]: line for line in decisions(run_dir)}
    assert sorted(lines) == list(range(1, STEPS + 1))
    accepted = Counter(task for line in lines.values() for task in line["accepted"])
    assert set(accepted.values()) == {1} and sum(accepted.values()) == 4 * STEPS
    seen: set[int] = set()
    for line in lines.values():
        seen |= set(line["candidates"])
        assert set(line["accepted"]) | {int(task) for task in line["dropped"]} == set(line["candidates"])
    assert seen == set(range(max(seen) + 1)) and seen - accepted.keys() == {int(t) for t in lines[STEPS]["dropped"]}


def check_versions(run_dir: Path) -> None:
    """Versions never fall within an episode, and some go on over an update of the weights."""
    figures, mixed = course(run_dir)[0].metrics, 0
    for step in range(1, STEPS + 1):
        for item in read_trajectories(run_dir, step):
            for segment in item.trajectory.segments:
                versions = segment.policy_versions[segment.response_mask]
                assert torch.equal(versions, versions.sort().values) and versions.max() < step
                mixed += len(versions.unique()) > 1
    assert mixed > 0 and sum(figures[step]["staleness/mixed_trajectories"] for step in figures) > 0
    assert sum(figures[step]["partial/episodes_resumed"] for step in figures) > 0
    assert sum(figures[step]["partial/tokens_carried"] for step in figures) > 0
    assert all(figures[step]["partial/episodes_restarted"] == 0 for step in figures)


@pytest.mark.parametrize(("world_size", "ahead"), [(1, 0), (2, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_stopped_groups_go_on_under_newer_weights(model: str, tmp_path: Path, world_size: int, ahead: int) -> None:
    run_command(world_size, arguments(model, tmp_path, *PARTIAL, f"trainer.async={ahead}"))
    check_prompts(tmp_path)
    check_versions(tmp_path)


def test_groups_that_wait_survive_a_break(model: str, tmp_path: Path) -> None:
    settings = arguments(model, tmp_path, *PARTIAL)
    assert run_ranks(break_off_on_rank, 2, settings, 3) == ["power cut"] * 2
    before = decisions(tmp_path)
    assert any(group["held"] and str(group["task"]) in before[1]["dropped"] for group in before[1]["groups"])
    run_command(2, settings)
    assert decisions(tmp_path)[: len(before)] == before  # the lost step was repeated, not decided again
    check_prompts(tmp_path)
    third = read_trajectories(tmp_path, 3)
    old = {item.trajectory.id for item in third if item.trajectory.id.step < 3}
    assert {key.task for key in old} == {group["task"] for group in before[2]["groups"] if group["born"] < 3} & {
        *before[2]["accepted"]
    }


def test_without_partial_rollouts_what_waited_starts_anew(model: str, tmp_path: Path) -> None:
    settings = arguments(model, tmp_path, *PARTIAL)
    assert run_ranks(break_off_on_rank, 1, settings, 2) == ["power cut"]
    (tmp_path / "acceptance.jsonl").unlink()
    run_command(1, [*settings, "actor_rollout_ref.rollout.partial_rollout=false"])
    assert all(group["born"] == line["step"] for line in decisions(tmp_path) for group in line["groups"])
