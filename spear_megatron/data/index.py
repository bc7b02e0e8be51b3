"""One small row per trajectory, the same on every rank: what decisions and metrics are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState
from spear_megatron.types import Group, RewardParts, StopReason, Trajectory, TrajectoryId


@dataclass(frozen=True, slots=True)
class IndexRow:
    """Figures of one trajectory; the lengths count tokens, one entry per segment.

    ``response_lengths`` count everything after the segment's prompt, ``sampled_lengths`` only the policy's own tokens.
    """

    id: TrajectoryId
    owner: int
    task_id: str
    reward: RewardParts
    stop_reason: StopReason
    num_turns: int
    num_tool_calls: int
    num_tool_failures: int
    prompt_length: int
    segment_lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    sampled_lengths: tuple[int, ...]
    error: str | None = None

    @property
    def valid(self) -> bool:
        """False when infrastructure failed."""
        return self.stop_reason is not StopReason.INFRASTRUCTURE


def index_row(trajectory: Trajectory, task_id: str, owner: int) -> IndexRow:
    """The index row of one trajectory held by data-parallel rank ``owner``."""
    segments = trajectory.segments
    return IndexRow(
        id=trajectory.id,
        owner=owner,
        task_id=task_id,
        reward=trajectory.reward,
        stop_reason=trajectory.stop_reason,
        num_turns=trajectory.num_turns,
        num_tool_calls=trajectory.num_tool_calls,
        num_tool_failures=trajectory.num_tool_failures,
        prompt_length=segments[0].prompt_length if segments else 0,
        segment_lengths=tuple(len(segment.ids) for segment in segments),
        response_lengths=tuple(len(segment.ids) - segment.prompt_length for segment in segments),
        sampled_lengths=tuple(int(segment.response_mask.sum()) for segment in segments),
        error=trajectory.error,
    )


def gather_index(groups: Sequence[Group], parallel: ParallelState) -> list[IndexRow]:
    """All trajectories' rows of every leader, sorted by id: identical on every rank."""
    owner = parallel.dp_rank
    own = [index_row(member, group.prompt.task_id, owner) for group in groups for member in group.trajectories]
    rows = [row for part in gather_objects(parallel, own) for row in part]
    return sorted(rows, key=lambda row: row.id)
