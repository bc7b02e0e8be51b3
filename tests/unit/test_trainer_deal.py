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
from spear_megatron.trainer.deal import plan_deal
from spear_megatron.trainer.parts import StepSettings
from spear_megatron.trainer.run import Run
from spear_megatron.trainer.run_config import TrainerConfig
from spear_megatron.trainer.scoring import Scores
from spear_megatron.types import Group, Prompt, RewardParts, Row, Segment, StopReason, Trajectory, TrajectoryId

PROMPT_LENGTH = 3
INFRASTRUCTURE = -1
ALONE: Any = SimpleNamespace(
    rank=0, world_size=1, is_leader=True, leader_rank=0, dp_rank=0, dp_size=1, tp_size=1, pp_size=1, model_size=1
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
    parts: Any = SimpleNamespace(parallel=ALONE, imitation=None)
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


def scores_of(step: Collected, masked: tuple[TrajectoryId, ...] = ()) -> Scores:
    rewards = {row.id: row.reward.outcome for row in step.index if row.valid}
    groups = frozenset(key.group for key in rewards)
    reasons = dict.fromkeys(masked, "overlong")
    return Scores(
        mu=0.0, base=rewards, bonus=dict.fromkeys(rewards, 0.0), rewards=rewards, masked=reasons, groups=groups,
        counted=frozenset(rewards),
    )  # fmt: skip


def dealt(run: Run, lengths: list[list[int]], masked: tuple[TrajectoryId, ...] = ()) -> list[Row]:
    step = collected(lengths)
    return run.deal(step, scores_of(step, masked))


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
    two: Any = SimpleNamespace(parallel=SimpleNamespace(**{**vars(ALONE), "dp_size": 2}), imitation=None)
    run.parts = two
    dealt(run, [[4, 0], [0, 4]])
    assert len(owners) == 4 and owners[(TrajectoryId(1, 0, 0), 0)] != owners[(TrajectoryId(1, 1, 1), 0)]
    assert run._metrics["perf/imbalance"] == 0.0


def test_a_group_without_any_sampled_token_keeps_its_place_in_the_mini_batches() -> None:
    run = one_rank_run(ppo_mini_batch_size=1)
    rows = dealt(run, [[0, 0], [3, 3]])
    assert [[row.trajectory.task for row in part.rows] for part in run.mini_batches(rows)] == [[0, 0], [1, 1]]


def test_a_filtered_trajectory_keeps_its_row_without_any_loss() -> None:
    rows = dealt(one_rank_run(), [[4, 3], [2, 2]], masked=(TrajectoryId(1, 0, 1),))
    assert [int(row.response_mask.sum()) for row in rows] == [4, 0, 2, 2]


REPLAYED = {TrajectoryId(-2, task, 0): tokens for task, tokens in enumerate([9, 5, 4, 3, 2, 1])}


def planned(update: Any, num_ranks: int = 1) -> Any:
    index = collected([[4, 4], [4, 4], [4, 4]]).index
    return plan_deal(
        index, (), REPLAYED, groups_per_mini_batch=1, rows_per_mini_batch=4, num_ranks=num_ranks, update=update
    )


def test_replayed_trajectories_are_dealt_once_over_the_mini_batches_equal_by_tokens() -> None:
    deal = planned("joint")
    assert deal.numbers == [0, 1, 2] and deal.replay_mini_batch_of.keys() == REPLAYED.keys()
    loads = [sum(REPLAYED[name] for name, number in deal.replay_mini_batch_of.items() if number == n) for n in range(3)]
    assert sorted(loads) == [7, 8, 9]


def test_the_mini_batches_do_not_depend_on_the_number_of_ranks_and_ranks_share_tokens() -> None:
    one, two = planned("joint"), planned("joint", num_ranks=2)
    assert one.mini_batch_of == two.mini_batch_of and one.replay_mini_batch_of == two.replay_mini_batch_of
    assert {*two.owner_of.values(), *two.replay_owner_of.values()} == {0, 1} and two.imbalance < 0.2


def test_separate_mini_batches_of_replay_follow_in_id_order() -> None:
    deal = planned("separate")
    assert deal.numbers == [0, 1, 2, 3, 4]
    assert [deal.replay_mini_batch_of[name] for name in sorted(REPLAYED)] == [3, 3, 3, 3, 4, 4]


def test_nothing_is_replayed_without_a_row_to_train_on() -> None:
    deal = plan_deal([], (), REPLAYED, groups_per_mini_batch=1, rows_per_mini_batch=4, num_ranks=1, update="joint")
    assert deal.numbers == [] and deal.replay_owner_of == {}
