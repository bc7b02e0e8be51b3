"""Evaluating through a collector: what infrastructure failures do to the figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from spear_megatron.data.index import index_row
from spear_megatron.evaluation.run import Evaluation, evaluate
from spear_megatron.parallel.errors import RunError
from spear_megatron.rollout.collect import Collected, Tasks
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.types import Group, Prompt, RewardParts, StopReason, Trajectory, TrajectoryId

ALONE: Any = SimpleNamespace(rank=0, world_size=1, is_leader=True, dp_rank=0, dp_size=1)


def evaluated(outcomes: list[list[bool | None]]) -> Evaluation:
    """Evaluation of problems whose samples succeed, fail, or are lost to infrastructure (None)."""
    groups = []
    for task, samples in enumerate(outcomes):
        members = [
            Trajectory(
                TrajectoryId(7, task, sample),
                (),
                RewardParts(float(bool(won)), success=bool(won)),
                StopReason.INFRASTRUCTURE if won is None else StopReason.ANSWER,
                0,
                error="sandbox: gone" if won is None else None,
            )
            for sample, won in enumerate(samples)
        ]
        groups.append(Group(Prompt(f"t{task}", ()), tuple(members)))
    index = [index_row(member, group.prompt.task_id, 0) for group in groups for member in group.trajectories]
    collector: Any = SimpleNamespace(collect=lambda tasks: Collected(groups, index))
    tasks = Tasks("val", 7, (), len(outcomes[0]), SamplingParams(max_new_tokens=4))
    answer_of = lambda member: str(member.reward.success)  # noqa: E731
    sizes = (1, len(outcomes[0]))
    return evaluate(collector, tasks, parallel=ALONE, answer_of=answer_of, name="step 7", ks=sizes, seed=0)


def test_lost_samples_are_left_out_and_counted() -> None:
    report = evaluated([[True, True, False], [None, False, True]]).report
    assert report.num_excluded == 1 and report.num_samples == 5
    assert report.metrics["avg@1"].value == 0.5 and report.metrics["pass@3"].num_problems == 1


def test_an_evaluation_survives_when_every_problem_lost_a_sample() -> None:
    report = evaluated([[True, True, None], [None, False, None]]).report
    assert report.num_excluded == 3
    assert report.metrics["pass@2"].value == 1.0 and report.metrics["pass@2"].num_problems == 1
    assert "pass@3" not in report.metrics


def test_nothing_left_is_an_error_with_its_cause() -> None:
    with pytest.raises(RunError, match="no valid sample of 2; errors: .*sandbox: gone"):
        evaluated([[None, None]])
