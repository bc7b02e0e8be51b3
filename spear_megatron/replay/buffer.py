"""The replay buffer on one rank: the index and the baseline that all ranks hold, and the payloads of this leader."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spear_megatron.algorithms.recalibration import GroupStatistics
from spear_megatron.data.balance import assign
from spear_megatron.data.exchange import TensorRecord, decode_records, encode_records
from spear_megatron.data.files import FileEntry, FileSystem
from spear_megatron.parallel.agreement import agreed, gather_objects
from spear_megatron.parallel.state import ParallelState
from spear_megatron.replay.decisions import (
    Entries,
    ReplayRules,
    ReplaySelection,
    rejection,
    select,
    split_evicted,
    split_expired,
)
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.replay.storage import Place, SegmentWriter, newest_files, read_record, segment_files
from spear_megatron.types import TrajectoryId

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What a step's push will do, decided alike on every rank before any payload is made.

    Attributes:
        accepted: entries that enter the buffer, sorted by id; some of them may be ``evicted`` at once.
        rejected: trajectories kept out, by rule.
    """

    accepted: Entries = ()
    rejected: Mapping[str, tuple[TrajectoryId, ...]]


class ReplayBuffer:
    """Good trajectories of the latest steps. All ranks call the collective methods in the same order."""

    def __init__(
        self,
        rules: ReplayRules,
        parallel: ParallelState,
        run_dir: Path,
        *,
        baseline_size: int,
        seed: int,
        temperature: float,
        max_tokens: int | None = None,
        files: FileSystem | None = None,
    ) -> None:
        """An empty buffer; nothing is written before the first push.

        Args:
            run_dir: run directory, on a file system that all leaders share.
            baseline_size: latest group means that the baseline is the median of.
            temperature: of today's sampling; restored trajectories of another one are dropped.
            max_tokens: tokens of one segment that a micro-batch can hold; restored longer ones are dropped.
        """
        self._rules = rules
        self._parallel = parallel
        self._run_dir = run_dir
        self._baseline_size = baseline_size
        self._seed = seed
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._entries: dict[TrajectoryId, ReplayEntry] = {}
        self._baseline: list[GroupStatistics] = []
        self._payloads: dict[TrajectoryId, TensorRecord] = {}
        self._places: dict[TrajectoryId, Place] = {}
        self._last_push_step: int | None = None
        self._collectable: set[str] = set()
        self._files = files or FileSystem()
        self._writer: SegmentWriter | None = None
        if parallel.is_leader:
            size = int(rules.replay.segment_mib * _MIB)
            self._writer = SegmentWriter(run_dir, parallel.dp_rank, segment_bytes=size, files=self._files)

    @property
    def entries(self) -> Entries:
        """The index, sorted by id; equal on every rank."""
        return tuple(self._entries[key] for key in sorted(self._entries))

    @property
    def baseline(self) -> tuple[GroupStatistics, ...]:
        """D_R, oldest first; equal on every rank."""
        return tuple(self._baseline)

    @property
    def num_bytes(self) -> int:
        """Payload bytes over all ranks."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def trigger(self) -> float:
        """Trajectories that the buffer must count before anything is replayed."""
        return self._rules.trigger

    def expire(self, step: int) -> tuple[TrajectoryId, ...]:
        """Drop what is too old to be replayed at ``step``; the ids dropped. Every rank does the same."""
        if self._rules.replay.staleness != "exact":
            return ()  # the released code expires before a push alone
        return self._drop(split_expired(self.entries, step, self._last_push_step, self._rules)[1])

    def select(self, step: int, mu: float, batch_size: int) -> ReplaySelection:
        """What to replay at ``step``, the same on every rank; see :func:`spear_megatron.replay.decisions.select`."""
        return select(
            self.entries, self._baseline, self._rules, step=step, mu=mu, batch_size=batch_size, seed=self._seed
        )

    def payloads(self, trajectories: Collection[TrajectoryId]) -> dict[TrajectoryId, TensorRecord]:
        """Those of the trajectories' payloads that lie on this rank, in id order."""
        return {key: self._payloads[key] for key in sorted(trajectories) if key in self._payloads}

    def clear_after_use(self) -> tuple[TrajectoryId, ...]:
        """Empty the buffer if ``replay.after_use`` says so; the ids dropped."""
        return self._drop(self.entries) if self._rules.replay.after_use == "clear" else ()

    def plan_push(self, candidates: Iterable[ReplayEntry]) -> PushPlan:
        """Apply the push rules to valid, unfiltered trajectories; changes nothing."""
        accepted: list[ReplayEntry] = []
        rejected: dict[str, list[TrajectoryId]] = {"advantage": [], "requirement": []}
        for entry in sorted(candidates, key=lambda item: item.id):
            rule = rejection(entry, self._rules)
            if rule is None:
                accepted.append(entry)
            else:
                rejected[rule].append(entry.id)
        return PushPlan(accepted=tuple(accepted), rejected={rule: tuple(ids) for rule, ids in rejected.items()})

    def push(
        self,
        step: int,
        plan: PushPlan,
        payloads: Mapping[TrajectoryId, TensorRecord],
        groups: Sequence[GroupStatistics],
    ) -> tuple[tuple[TrajectoryId, ...], tuple[TrajectoryId, ...]]:
        """Store a step's accepted trajectories and its group means; collective.

        Args:
            payloads: of those accepted trajectories whose ``shard`` is this data-parallel rank, on its leader.
            groups: statistics of the step's groups in id order.

        Returns:
            (expired, evicted) ids.

        Raises:
            ValueError, OSError: on every rank, when one lacks a payload or cannot write.
        """
        expired: tuple[TrajectoryId, ...] = ()
        if self._rules.replay.staleness == "released":
            expired = self._drop(split_expired(self.entries, step, self._last_push_step, self._rules)[1])
        self._baseline = [*self._baseline, *groups][-self._baseline_size :]
        kept, evicted = split_evicted((*self.entries, *plan.accepted), self._rules)
        new = {entry.id for entry in kept} - self._entries.keys()
        with agreed(self._parallel, "replay push"):
            self._store([entry for entry in plan.accepted if entry.id in new], payloads)
        self._entries.update({entry.id: entry for entry in plan.accepted if entry.id in new})
        self._drop([entry for entry in evicted if entry.id in self._entries])
        if plan.accepted:
            self._last_push_step = step
        return expired, tuple(entry.id for entry in evicted)

    def _store(self, entries: Iterable[ReplayEntry], payloads: Mapping[TrajectoryId, TensorRecord]) -> None:
        if self._writer is None:
            return
        for entry in entries:
            if entry.shard != self._parallel.dp_rank:
                continue
            if entry.id not in payloads:
                raise ValueError(f"trajectory {entry.id} was accepted into the replay buffer without its payload")
            record = payloads[entry.id]
            self._places[entry.id] = self._writer.append(entry.id, encode_records([record]).numpy().data)
            self._payloads[entry.id] = record

    def _drop(self, entries: Iterable[ReplayEntry]) -> tuple[TrajectoryId, ...]:
        gone = tuple(entry.id for entry in entries)
        for key in gone:
            del self._entries[key]
            self._payloads.pop(key, None)
            self._places.pop(key, None)
        if self._writer is not None:
            self._writer.forget(gone)
        return gone

    def snapshot(self) -> tuple[dict[str, Any], list[FileEntry]]:
        """The state for a checkpoint, and the files with their valid bytes that it names; collective.

        Everything named is durable on return.

        Raises:
            OSError, ValueError: on every rank, when one cannot write.
        """
        own: list[FileEntry] = []
        with agreed(self._parallel, "replay files"):
            if self._writer is not None:
                own = self._writer.sync()
        open_file = self._writer.open_file if self._writer is not None else None
        gathered = gather_objects(self._parallel, (own, self._places, open_file))
        files = sorted({entry.path: entry for part, _, _ in gathered for entry in part}.values(), key=lambda e: e.path)
        places = {key: place for _, part, _ in gathered for key, place in part.items()}
        in_use = {entry.path for entry in files} | {name for _, _, name in gathered if name is not None}
        if self._parallel.rank == 0:
            present = segment_files(self._run_dir)
            self._collectable = present - in_use - newest_files(present)
        state = {
            "entries": [{**entry.encode(), "place": asdict(places[entry.id])} for entry in self.entries],
            "baseline": [list(asdict(part).values()) for part in self._baseline],
            "last_push_step": self._last_push_step,
            "shards": self._parallel.dp_size,
        }
        return state, files

    def collect(self, named: set[str]) -> None:
        """Delete the segment files that the buffer no longer needs and no kept checkpoint names; on rank 0 alone.

        Files that are newer than the latest :meth:`snapshot` are left alone, and so is the newest of every leader: its
        number must not come again.
        """
        for name in sorted(self._collectable - named):
            with contextlib.suppress(FileNotFoundError):
                self._files.remove_file(self._run_dir / name)
        self._collectable &= named

    def restore(self, state: Mapping[str, Any], files: Sequence[FileEntry]) -> Counter[str]:
        """Continue from a checkpoint of any data-parallel size; collective.

        With another size every trajectory goes to a new leader, equal by tokens. Trajectories sampled at another
        temperature are dropped.

        Args:
            state: of :meth:`snapshot`. files: what the checkpoint names, already verified.

        Returns:
            Number of trajectories restored, and dropped by reason.

        Raises:
            DamagedSegment: on every rank, when a record does not hold what was written.
        """
        entries = [ReplayEntry.decode({k: v for k, v in row.items() if k != "place"}) for row in state["entries"]]
        places = {TrajectoryId(*row["id"]): Place(**row["place"]) for row in state["entries"]}
        self._drop(self.entries)
        fitting = [entry for entry in entries if self._max_tokens is None or entry.longest <= self._max_tokens]
        same = [entry for entry in fitting if entry.temperature == self._temperature]
        if state["shards"] != self._parallel.dp_size:
            same = resharded(same, self._parallel.dp_size)
        self._entries = {entry.id: entry for entry in same}
        self._baseline = [GroupStatistics(*values) for values in state["baseline"]][-self._baseline_size :]
        self._last_push_step = state["last_push_step"]
        with agreed(self._parallel, "replay restore"):
            self._load([entry for entry in same if entry.shard == self._parallel.dp_rank], places, files)
        return Counter(restored=len(same), temperature=len(fitting) - len(same), length=len(entries) - len(fitting))

    def _load(
        self, own: Sequence[ReplayEntry], places: Mapping[TrajectoryId, Place], files: Sequence[FileEntry]
    ) -> None:
        if self._writer is None:
            return
        for entry in own:
            data = read_record(self._run_dir, places[entry.id], entry.id)
            self._payloads[entry.id] = decode_records(torch.frombuffer(bytearray(data), dtype=torch.uint8))[0]
            self._places[entry.id] = places[entry.id]
        self._writer.adopt(files, self._places)

    def close(self) -> None:
        """Close the open file."""
        if self._writer is not None:
            self._writer.close()


def resharded(entries: Sequence[ReplayEntry], num_shards: int) -> list[ReplayEntry]:
    """Entries with new shards, equal by tokens; a pure function of the entries in id order."""
    ordered = sorted(entries, key=lambda entry: entry.id)
    owners = assign([float(entry.num_tokens) for entry in ordered], [0] * len(ordered), num_shards)
    return [replace(entry, shard=owner) for entry, owner in zip(ordered, owners, strict=True)]
