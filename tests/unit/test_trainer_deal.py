"""Dealing rows: every row of a valid trajectory takes part, whether or not any of its tokens was sampled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spear_megatron.trainer.run as run_module
from spear_megatron.algorithms.aggregation import count_totals, token_weights
from spear_megatron.algorithms.config import AlgorithmConfig
from spear_megatron.data.index import index_row
from spear_megatron.rollout.collect import Collected
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.trainer.run import Run, StepSettings
from spear_megatron.trainer.run_config import TrainerConfig
from spear_megatron.types import Group, Prompt, RewardParts, Row, Segment, StopReason, Trajectory, TrajectoryId

PROMPT_LENGTH = 3
INFRASTRUCTURE = -1
ALONE: Any = SimpleNamespace(
    rank=0, world_size=1, is_leader=True, leader_rank=0, dp_rank=0, dp_size=1, tp_size=1, pp_size=1
)


def one_rank_run(ppo_mini_batch_size: int = 2) -> Run:
    sampling = SamplingParams(max_new_tokens=8)
    settings = StepSettings(
        prompts_per_step=2,
        samples_per_prompt=2,
        sampling=sampling,
        val_samples=1,
        val_sampling=sampling,
        ppo_mini_batch_size=ppo_mini_batch_size,
        ppo_epochs=1,
    )
    parts: Any = SimpleNamespace(parallel=ALONE)
    return Run(parts=parts, settings=settings, trainer=TrainerConfig(), algorithm=AlgorithmConfig())


def trajectory(task: int, sample: int, sampled: int) -> Trajectory:
    """``sampled`` tokens after the prompt, none of them for 0; INFRASTRUCTURE for a failed one."""
    mask = torch.tensor([False] * PROMPT_LENGTH + [True] * max(sampled, 0))
    segment = Segment(torch.arange(len(mask), dtype=torch.int32), mask, torch.zeros(len(mask)))
    failed = sampled == INFRASTRUCTURE
    reason = StopReason.INFRASTRUCTURE if failed else StopReason.ANSWER
    return Trajectory(TrajectoryId(1, task, sample), (segment,), RewardParts(float(sample)), reason, 0)


def collected(lengths: list[list[int]]) -> Collected:
    groups = [
        Group(Prompt(f"t{task}", ()), tuple(trajectory(task, i, n) for i, n in enumerate(row)))
        for task, row in enumerate(lengths)
    ]
    index = [index_row(member, group.prompt.task_id, 0) for group in groups for member in group.trajectories]
    return Collected(groups, index)


def dealt(run: Run, lengths: list[list[int]]) -> list[Row]:
    return run.deal(collected(lengths))


def test_rows_without_sampled_tokens_are_kept_and_infrastructure_failures_are_not() -> None:
    rows = dealt(one_rank_run(), [[4, 0], [INFRASTRUCTURE, 2]])
    assert [(row.trajectory.task, row.trajectory.sample) for row in rows] == [(0, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("mode", "weight"), [("token-mean", 1 / 6), ("seq-mean-token-sum", 1 / 3), ("seq-mean-token-sum-norm", 1 / 24)]
)
def test_such_rows_count_in_means_over_rows_alone(mode: str, weight: float) -> None:
    rows = dealt(one_rank_run(), [[4, 0], [INFRASTRUCTURE, 2]])
    totals = count_totals([row.trajectory for row in rows], [row.response_mask for row in rows])
    mask, row = rows[0].response_mask, rows[0].trajectory
    weights = token_weights(mask, row=row, mode=mode, totals=totals, max_response_length=8)
    assert weights[PROMPT_LENGTH:].tolist() == pytest.approx([weight] * 4)


def test_they_cost_nothing_when_ranks_are_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    owners: dict[Any, int] = {}
    monkeypatch.setattr(run_module, "redistribute", lambda rows, destination, *_, **__: owners.update(destination))
    run = one_rank_run()
    run.parts = SimpleNamespace(parallel=SimpleNamespace(**{**vars(ALONE), "dp_size": 2}))  # type: ignore[assignment]
    dealt(run, [[4, 0], [0, 4]])
    assert len(owners) == 4 and owners[(TrajectoryId(1, 0, 0), 0)] != owners[(TrajectoryId(1, 1, 1), 0)]
    assert run._metrics["perf/imbalance"] == 0.0


def test_a_group_without_any_sampled_token_keeps_its_place_in_the_mini_batches() -> None:
    run = one_rank_run(ppo_mini_batch_size=1)
    rows = dealt(run, [[0, 0], [3, 3]])
    assert [[row.trajectory.task for row in part] for part in run.mini_batches(rows)] == [[0, 0], [1, 1]]
