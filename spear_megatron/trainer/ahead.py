"""A whole step's trajectories that wait to be trained on, and their place in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spear_megatron.data.exchange import decode_records, encode_records, exchange
from spear_megatron.data.index import gather_index
from spear_megatron.data.trajectory_records import record_to_trajectory, trajectory_to_record
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.acceptance import from_json, to_json
from spear_megatron.rollout.collect import Collected
from spear_megatron.types import Group, Prompt, Trajectory


@dataclass(frozen=True, slots=True)
class Generated:
    """The trajectories of ``step``, sampled by weights of ``version``, and figures of how they were made."""

    step: int
    version: int
    collected: Collected
    metrics: Mapping[str, float] = field(default_factory=dict)


def encode_generated(generated: Generated, parallel: ParallelState, *, timeout_s: float) -> dict[str, Any]:
    """A checkpoint's state: figures, and all trajectories of all leaders in the layout of safetensors, on rank 0.

    Collective; on ranks that do not share data-parallel rank 0's model copy the trajectories are missing.

    Args:
        timeout_s: deadline of the exchange.
    """
    own = [member for group in generated.collected.groups for member in group.trajectories]
    payloads = [(0, trajectory_to_record(member, owner=parallel.dp_rank)) for member in own]
    records = exchange(payloads, parallel, phase="trajectories of the next step", timeout_s=timeout_s)
    return {
        "step": generated.step,
        "version": generated.version,
        "metrics": dict(generated.metrics),
        "acceptances": [to_json(acceptance) for acceptance in generated.collected.acceptances],
        "trajectories": encode_records(records),
    }


def decode_generated(
    state: Mapping[str, Any], parallel: ParallelState, prompt_at: Callable[[int], Prompt]
) -> Generated:
    """Inverse of :func:`encode_generated`; collective. Each leader takes its own groups.

    With another number of data-parallel ranks the groups are dealt anew.

    Args:
        prompt_at: the prompt of a stream index.
    """
    members: dict[tuple[int, int], list[Trajectory]] = {}
    owners: dict[tuple[int, int], int] = {}
    for record in decode_records(state["trajectories"]):
        trajectory = record_to_trajectory(record)
        members.setdefault(trajectory.id.group, []).append(trajectory)
        owners[trajectory.id.group] = int(record.fields["owner"]) % parallel.dp_size
    groups = [
        Group(prompt_at(key[1]), tuple(sorted(members[key], key=lambda member: member.id)))
        for key in sorted(members)
        if parallel.is_leader and owners[key] == parallel.dp_rank
    ]
    acceptances = tuple(from_json(line) for line in state["acceptances"])
    collected = Collected(groups, gather_index(groups, parallel), acceptances)
    return Generated(int(state["step"]), int(state["version"]), collected, dict(state["metrics"]))
