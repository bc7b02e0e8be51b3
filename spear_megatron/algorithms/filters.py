"""Which trajectories and task groups carry loss: the sample and group filters of Dr. BoT (arXiv 2509.22601).

Repetition and readability are judged on what the policy itself sampled, never on tool output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from spear_megatron.algorithms.moments import deviations
from spear_megatron.algorithms.rounding import floor_share
from spear_megatron.types import StopReason, TrajectoryId

GroupId = tuple[int, int]
"""(step, task), see :attr:`spear_megatron.types.TrajectoryId.group`."""

_OVERLONG = (StopReason.LENGTH, StopReason.TOOL_OVERFLOW, StopReason.TURN_LIMIT)
# The replacement character; its three UTF-8 bytes read as Latin-1; the full-width question mark's read as cp1252.
_UNREADABLE = ("\ufffd", "\u00ef\u00bf\u00bd", "\u00ef\u00bc\u0178")


def sampled_runs(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous runs of sampled tokens, in order.

    Args:
        ids: int32 [n]. mask: bool [n], True on tokens that the policy sampled.
    """
    edges = torch.diff(mask.to(torch.int8), prepend=mask.new_zeros(1).to(torch.int8))
    starts = torch.nonzero(edges == 1).flatten().tolist()
    ends = torch.nonzero(edges == -1).flatten().tolist()
    if len(ends) < len(starts):
        ends.append(len(ids))
    return [ids[start:end] for start, end in zip(starts, ends, strict=True)]


def is_repetitive(runs: Sequence[torch.Tensor], *, n: int = 20, times: int = 10) -> bool:
    """Whether one n-gram occurs at least ``times`` times, overlaps counted, over all ``runs`` together.

    Args:
        runs: integer [m_i], contiguous tokens of the policy; an n-gram lies inside one run.
    """
    counts: dict[bytes, int] = {}
    for run in runs:
        data = run.to(device="cpu", dtype=torch.int32).numpy().tobytes()
        for start in range(0, len(data) - 4 * n + 1, 4):
            gram = data[start : start + 4 * n]
            count = counts.get(gram, 0) + 1
            if count >= times:
                return True
            counts[gram] = count
    return False


def is_unreadable(texts: Sequence[str]) -> bool:
    """Whether the model's own ``texts`` hold undecodable bytes, or bytes that were decoded as the wrong encoding."""
    return any(mark in text for text in texts for mark in _UNREADABLE)


def masked_reason(
    stop_reason: StopReason,
    flags: Collection[str],
    *,
    overlong: bool,
    incomplete: bool,
    repetitive: bool,
    unreadable: bool,
) -> str | None:
    """Name of the first filter that takes a trajectory out of the loss, or None.

    Args:
        stop_reason: why the episode ended. Overlong are the length limit, tool output that did not fit, and the turn
            limit; incomplete are void turns.
        flags: holds "repetitive" and "unreadable" where those were found.
        overlong, incomplete, repetitive, unreadable: which filters are on.
    """
    if incomplete and stop_reason is StopReason.VOID_TURN:
        return "incomplete"
    if overlong and stop_reason in _OVERLONG:
        return "overlong"
    if repetitive and "repetitive" in flags:
        return "repetitive"
    if unreadable and "unreadable" in flags:
        return "unreadable"
    return None


def group_spread(rewards: Mapping[TrajectoryId, float]) -> dict[GroupId, float]:
    """Sample standard deviation of the rewards of every task group; exactly 0 for equal rewards or one member."""
    members: dict[GroupId, list[float]] = {}
    for trajectory, reward in rewards.items():
        members.setdefault(trajectory.group, []).append(reward)
    return {group: deviations(values)[1] for group, values in members.items()}


def kept_groups(spread: Mapping[GroupId, float], ratio: float, kind: str) -> set[GroupId]:
    """The floor(ratio * G) groups of largest (std) or smallest (std_rev) spread, at least one; ties go to lower ids.

    Args:
        spread: of every group. ratio: share to keep, in (0, 1].

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind not in ("std", "std_rev"):
        raise ValueError(f"actor_rollout_ref.rollout.rollout_filter_type is {kind!r}; use std or std_rev.")
    sign = -1.0 if kind == "std" else 1.0
    order = sorted(spread, key=lambda group: (sign * spread[group], group))
    return set(order[: max(floor_share(ratio, len(order)), 1)])


def informative_groups(spread: Mapping[GroupId, float]) -> set[GroupId]:
    """Groups whose rewards differ, which alone have a gradient (dynamic sampling: DAPO, arXiv 2503.14476, eq. 11)."""
    return {group for group, value in spread.items() if value > 0}
