"""Running the agent on held-out prompts: the training's own collector, then avg@k, pass@k, maj@k with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spear_megatron.evaluation.metrics import ProblemSamples
from spear_megatron.evaluation.report import EvaluationReport, evaluate_samples
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.collect import Collector, Tasks
from spear_megatron.types import Group, Trajectory


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``report`` is the same on every rank; ``groups`` are those of this leader."""

    report: EvaluationReport
    groups: list[Group]


def evaluate(
    collector: Collector,
    tasks: Tasks,
    *,
    parallel: ParallelState,
    answer_of: Callable[[Trajectory], str | None],
    name: str,
    ks: Sequence[int],
    seed: int,
) -> Evaluation:
    """Roll out ``tasks`` and measure success by outcome alone. Infrastructure failures are excluded and counted.

    Args:
        answer_of: canonical final answer of a trajectory, for maj@k.
        ks: sizes of the @k metrics, lowered where no problem has so many valid samples.

    Raises:
        RunError: a leader failed, or every sample was an infrastructure failure.
    """
    collected = collector.collect(tasks)
    parts = gather_objects(parallel, [_samples(group, answer_of) for group in collected.groups])
    problems = sorted((entry for part in parts for entry in part), key=lambda entry: entry[0])
    solved = [samples for _, samples in problems if samples is not None]
    excluded = sum(not row.valid for row in collected.index)
    if not solved:
        errors = sorted({row.error for row in collected.index if row.error})
        raise RunError(f"evaluation '{name}': no valid sample of {len(collected.index)}; errors: {errors[:3]}")
    most = max(len(samples.correct) for samples in solved)  # fewer than asked for, where every problem lost some
    report = evaluate_samples(name, solved, ks=[min(k, most) for k in ks], seed=seed, num_excluded=excluded)
    return Evaluation(report, collected.groups)


def _samples(group: Group, answer_of: Callable[[Trajectory], str | None]) -> tuple[int, ProblemSamples | None]:
    """Position of the problem and its valid samples, or None without any."""
    valid = [member for member in group.trajectories if member.valid]
    if not valid:
        return group.id[1], None
    return group.id[1], ProblemSamples(
        task_id=group.prompt.task_id,
        correct=tuple(member.reward.success for member in valid),
        answers=tuple(answer_of(member) for member in valid),
        data_source=group.prompt.data_source,
    )
