"""One small row per trajectory, the same on every rank: what decisions and metrics are made from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spear_megatron.algorithms.filters import is_repetitive, is_unreadable, sampled_runs
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState
from spear_megatron.types import Group, RewardParts, StopReason, Trajectory, TrajectoryId


@dataclass(frozen=True, slots=True)
class IndexRow:
    """Figures of one trajectory; the lengths count tokens, one entry per segment.

    ``response_lengths`` count everything after the segment's prompt, ``sampled_lengths`` only the policy's own tokens.
    ``step_rewards`` and ``step_invalid`` are the environment's reward and the invalid actions per segment; ``anchors``
    a 64-bit hash of what each segment observed, one of its own for a segment without an observation key. ``flags``
    names what the policy's own tokens and text look like: repetitive, unreadable. ``versions`` counts its tokens by the
    version of the weights that sampled them, ascending; empty if the engine does not tell.
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
    step_rewards: tuple[float, ...] = ()
    step_invalid: tuple[int, ...] = ()
    anchors: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()
    versions: tuple[tuple[int, int], ...] = ()

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
        step_rewards=tuple(segment.reward for segment in segments),
        step_invalid=tuple(segment.num_invalid_actions for segment in segments),
        anchors=tuple(_anchor(trajectory, position) for position in range(len(segments))),
        flags=response_flags(trajectory),
        versions=version_counts(trajectory),
    )


def version_counts(trajectory: Trajectory) -> tuple[tuple[int, int], ...]:
    """(version, sampled tokens) of a trajectory, ascending; empty unless every segment tells its versions."""
    counts: Counter[int] = Counter()
    for segment in trajectory.segments:
        if segment.policy_versions is None:
            return ()
        counts.update(segment.policy_versions[segment.response_mask].tolist())
    return tuple(sorted(counts.items()))


def response_flags(trajectory: Trajectory) -> tuple[str, ...]:
    """What filters look for in the policy's own tokens and text: repetitive, unreadable."""
    runs = [run for segment in trajectory.segments for run in sampled_runs(segment.ids, segment.response_mask)]
    texts = [str(message.get("content") or "") for message in trajectory.messages if message["role"] == "assistant"]
    found = {"repetitive": is_repetitive(runs), "unreadable": is_unreadable(texts)}
    return tuple(name for name, present in found.items() if present)


def _anchor(trajectory: Trajectory, position: int) -> int:
    key = trajectory.segments[position].observation_key
    text = f"alone/{trajectory.id}/{position}" if key is None else f"observation/{key}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def gather_index(groups: Sequence[Group], parallel: ParallelState) -> list[IndexRow]:
    """All trajectories' rows of every leader, sorted by id: identical on every rank."""
    owner = parallel.dp_rank
    own = [index_row(member, group.prompt.task_id, owner) for group in groups for member in group.trajectories]
    rows = [row for part in gather_objects(parallel, own) for row in part]
    return sorted(rows, key=lambda row: row.id)
