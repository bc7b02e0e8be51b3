"""Which groups of an over-sampled collection make up the step: one pure decision, recorded so that it can be repeated.

Stopping early favours groups that end early. Nothing here hides it: the figures compare what was accepted with all that
was started, and the share of episodes that ended is reported by length.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "acceptance.jsonl"
BUCKETS = (
    "oversampling/finished_share_q1",
    "oversampling/finished_share_q2",
    "oversampling/finished_share_q3",
    "oversampling/finished_share_q4",
)
UNFINISHED, SURPLUS, NOT_STARTED = "unfinished", "surplus", "not_started"


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """What had become of one started group when its leader stopped.

    Attributes:
        task: index of the prompt in the prompt stream.
        owner: data-parallel rank of its leader.
        complete: every episode ended.
        failed: it did, but infrastructure failed in all of them.
        episodes: (tokens sampled so far, whether it ended) by sample.
        born: step whose number its ids carry; None for the collection's own.
        held: if it is not accepted, its leader keeps it for a later step.
        resumed: episodes stopped in an earlier step that went on.
        lost: if it is not accepted, episodes whose tokens are thrown away: they start again.
        carried: sampled tokens that it brought along from earlier steps.
    """

    task: int
    owner: int
    complete: bool
    failed: bool
    episodes: tuple[tuple[int, bool], ...]
    born: int | None = None
    held: bool = False
    resumed: int = 0
    lost: int = 0
    carried: int = 0


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The decision on one collection, equal on all ranks.

    Attributes:
        step, batch: which collection; a step with dynamic sampling has several.
        wanted: groups that the step asked for.
        candidates: prompt indices that could be drawn, ascending.
        records: every started group, by prompt index.
        accepted: prompt indices of the groups that are trained on, ascending.
        dropped: why each other candidate is not: unfinished, surplus or not_started.
    """

    step: int
    batch: int
    wanted: int
    candidates: tuple[int, ...]
    records: tuple[GroupRecord, ...]
    accepted: tuple[int, ...]
    dropped: Mapping[int, str]

    @property
    def owners(self) -> dict[int, int]:
        """Data-parallel rank that rolled out each accepted group."""
        return {record.task: record.owner for record in self.records if record.task in set(self.accepted)}

    @property
    def born(self) -> dict[int, int]:
        """Step number of the ids of accepted groups that come from an earlier step."""
        kept = set(self.accepted)
        return {r.task: r.born for r in self.records if r.task in kept and r.born not in (None, self.step)}

    @property
    def held(self) -> dict[int, int]:
        """Data-parallel rank that keeps each group which goes on in a later step."""
        return {record.task: record.owner for record in self.records if record.held and record.task in self.dropped}


def accept(
    step: int, batch: int, wanted: int, candidates: Sequence[int], records: Sequence[GroupRecord]
) -> Acceptance:
    """The ``wanted`` complete groups of lowest prompt index: oldest prompts first, whichever leader was faster.

    Groups in which infrastructure failed everywhere fill up only what no other group can. The order of ``records`` does
    not matter.

    Raises:
        ValueError: a group was rolled out twice, or was no candidate.
    """
    ordered = sorted(records, key=lambda record: record.task)
    tasks = [record.task for record in ordered]
    if len(set(tasks)) != len(tasks) or not set(tasks) <= set(candidates):
        raise ValueError(f"step {step}: started groups {tasks} must be distinct candidates of {sorted(candidates)}")
    complete = [record for record in ordered if record.complete]
    chosen = sorted(complete, key=lambda record: (record.failed, record.task))[:wanted]
    accepted = tuple(sorted(record.task for record in chosen))
    ended = {record.task: record.complete for record in ordered}
    reasons = {True: SURPLUS, False: UNFINISHED, None: NOT_STARTED}
    return Acceptance(
        step=step,
        batch=batch,
        wanted=wanted,
        candidates=tuple(sorted(candidates)),
        records=tuple(ordered),
        accepted=accepted,
        dropped={task: reasons[ended.get(task)] for task in sorted(candidates) if task not in set(accepted)},
    )


def acceptance_metrics(
    acceptances: Sequence[Acceptance], max_response_length: int, *, partial: bool = False
) -> dict[str, float]:
    """Figures of a step's over-sampling; the length of an episode that was stopped counts as far as it got.

    Args:
        max_response_length: tokens; its quarters are the buckets q1 (shortest) to q4.
        partial: whether groups may be carried over, which has figures of its own.
    """
    if not acceptances:
        return {}
    records = [record for acceptance in acceptances for record in acceptance.records]
    kept = [r for a in acceptances for r in a.records if r.task in set(a.accepted)]
    started = [length for record in records for length, _ in record.episodes]
    accepted = [length for record in kept for length, _ in record.episodes]
    dropped = [reason for acceptance in acceptances for reason in acceptance.dropped.values()]
    figures = {
        "oversampling/groups_started": float(len(records)),
        "oversampling/groups_complete": float(sum(record.complete for record in records)),
        "oversampling/prompts_returned": float(len(dropped)),
        "oversampling/groups_unfinished": float(dropped.count(UNFINISHED)),
        "oversampling/groups_surplus": float(dropped.count(SURPLUS)),
        "oversampling/tokens_dropped": 1.0 - sum(accepted) / max(sum(started), 1),
        "oversampling/response_length_started": sum(started) / max(len(started), 1),
        "oversampling/response_length_accepted": sum(accepted) / max(len(accepted), 1),
    }
    if partial:
        left = [r for a in acceptances for r in a.records if r.task in a.dropped]
        figures |= {
            "partial/groups_held": float(sum(record.held for record in left)),
            "partial/groups_expired": float(sum(not record.held for record in left)),
            "partial/episodes_resumed": float(sum(record.resumed for record in records)),
            "partial/episodes_restarted": float(sum(record.lost for record in left)),
            "partial/tokens_carried": sum(record.carried for record in kept) / max(sum(accepted), 1),
        }
    buckets: dict[str, list[bool]] = {}
    for record in records:
        for length, ended in record.episodes:
            quarter = BUCKETS[min(len(BUCKETS) * length // max_response_length, len(BUCKETS) - 1)]
            buckets.setdefault(quarter, []).append(ended)
    return figures | {name: sum(ended) / len(ended) for name, ended in sorted(buckets.items())}


def to_json(acceptance: Acceptance) -> dict[str, Any]:
    """One line of the record."""
    return {
        "step": acceptance.step,
        "batch": acceptance.batch,
        "wanted": acceptance.wanted,
        "candidates": list(acceptance.candidates),
        "accepted": list(acceptance.accepted),
        "dropped": {str(task): reason for task, reason in acceptance.dropped.items()},
        "groups": [dataclasses.asdict(record) for record in acceptance.records],
    }


def from_json(line: Mapping[str, Any]) -> Acceptance:
    """Inverse of :func:`to_json`: the decision is taken again from the recorded groups.

    Raises:
        ValueError: the line does not describe one, or names another accepted set than its groups lead to.
    """
    try:
        records = [
            GroupRecord(**{**group, "episodes": tuple((int(n), bool(ended)) for n, ended in group["episodes"])})
            for group in line["groups"]
        ]
        again = accept(int(line["step"]), int(line["batch"]), int(line["wanted"]), line["candidates"], records)
        stated = tuple(line["accepted"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a line of {FILE} is not a decision: {type(error).__name__}: {error}") from None
    if again.accepted != stated:
        raise ValueError(f"{FILE}, step {again.step}: {list(stated)} were accepted, its groups say {again.accepted}")
    return again


class AcceptanceLog:
    """The decisions of a run: ``acceptance.jsonl`` in its directory, one line per collection.

    A collection that the file knows already is repeated: steps that a killed run lost, or a whole run whose file was
    copied into a new directory.
    """

    def __init__(self, known: Sequence[Mapping[str, Any]] = (), path: Path | None = None) -> None:
        """``known``: lines to repeat, the same on every rank. ``path``: where this rank writes, None on all but one.

        Raises:
            ValueError: a line is not a decision.
        """
        decisions = [from_json(line) for line in known]
        self._known = {(item.step, item.batch): item for item in decisions}
        self._path = path
        self._writes = False

    def find(self, step: int, batch: int, wanted: int, candidates: Sequence[int]) -> Acceptance | None:
        """The decision on this very collection, if it was taken before. Those of earlier steps are forgotten."""
        self._known = {key: item for key, item in self._known.items() if key[0] >= step}
        found = self._known.get((step, batch))
        same = found is not None and (found.wanted, found.candidates) == (wanted, tuple(sorted(candidates)))
        return found if same else None

    def write(self, acceptance: Acceptance) -> None:
        """Append a new decision, on disk for good when this returns."""
        if self._path is None:
            return
        if not self._writes:
            self._writes = True
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                data = self._path.read_bytes()
                os.truncate(self._path, data.rfind(b"\n") + 1)  # a line that an earlier process did not finish
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(to_json(acceptance)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def read_decisions(path: Path) -> list[dict[str, Any]]:
    """Lines of an ``acceptance.jsonl``, without a last one that was not finished; a later one on a collection wins.

    Raises:
        ValueError: one of them is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove it to decide anew") from None
