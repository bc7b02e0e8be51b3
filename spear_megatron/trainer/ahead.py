"""Trajectories that wait for a later step, and their place in a checkpoint: a whole step's, and groups that go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spear_megatron.data.exchange import TensorRecord, decode_records, encode_records, exchange
from spear_megatron.data.index import gather_index
from spear_megatron.data.trajectory_records import record_to_trajectory, trajectory_to_record
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.acceptance import from_json, to_json
from spear_megatron.rollout.collect import Collected
from spear_megatron.rollout.partial import HeldGroup, PartialEpisode
from spear_megatron.types import Group, Prompt, Trajectory


@dataclass(frozen=True, slots=True)
class Generated:
    """The trajectories of ``step``, sampled by weights of ``version``, and figures of how they were made."""

    step: int
    version: int
    collected: Collected
    metrics: Mapping[str, float] = field(default_factory=dict)


def encode_generated(
    generated: Generated, parallel: ParallelState, *, temperature: float, timeout_s: float
) -> dict[str, Any]:
    """A checkpoint's state: figures, and all trajectories of all leaders in the layout of safetensors, on rank 0.

    Collective; on ranks that do not share data-parallel rank 0's model copy the trajectories are missing.

    Args:
        temperature: that they were sampled at. timeout_s: deadline of the exchange.
    """
    own = [member for group in generated.collected.groups for member in group.trajectories]
    payloads = [(0, trajectory_to_record(member, owner=parallel.dp_rank)) for member in own]
    records = exchange(payloads, parallel, phase="trajectories of the next step", timeout_s=timeout_s)
    return {
        "step": generated.step,
        "version": generated.version,
        "temperature": temperature,
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


def encode_held(
    groups: Sequence[HeldGroup], parallel: ParallelState, *, temperature: float, timeout_s: float
) -> dict[str, Any]:
    """A checkpoint's state: the groups of all leaders that go on in a later step. Collective, as for the step above."""
    records: list[TensorRecord] = []
    for group in groups:
        parts: list[tuple[Trajectory, dict[str, Any] | None]] = [(ended, None) for ended in group.finished.values()]
        for partial in group.partial.values():
            point = {"stage": partial.stage, "turn_start": partial.turn_start, "environment": dict(partial.environment)}
            parts.append((partial.trajectory, point))
        for trajectory, stopped_at in parts:
            record = trajectory_to_record(trajectory, owner=parallel.dp_rank)
            records.append(replace(record, fields={**record.fields, "stopped_at": stopped_at}))
    payloads = [(0, record) for record in records]
    arrived = exchange(payloads, parallel, phase="groups that go on later", timeout_s=timeout_s)
    return {"temperature": temperature, "trajectories": encode_records(arrived)}


def decode_held(state: Mapping[str, Any], parallel: ParallelState) -> list[tuple[int, HeldGroup]]:
    """(data-parallel rank, group) of every group of :func:`encode_held`, the same on every rank."""
    groups: dict[int, HeldGroup] = {}
    owners: dict[int, int] = {}
    for record in decode_records(state["trajectories"]):
        trajectory, point = record_to_trajectory(record), record.fields["stopped_at"]
        born, task, sample = trajectory.id
        owners[task] = int(record.fields["owner"]) % parallel.dp_size
        group = groups.get(task, HeldGroup(born, task))
        if point is None:
            groups[task] = replace(group, finished={**group.finished, sample: trajectory})
        else:
            partial = PartialEpisode(trajectory, point["environment"], point["stage"], point["turn_start"])
            groups[task] = replace(group, partial={**group.partial, sample: partial})
    return [(owners[task], groups[task]) for task in sorted(groups)]
