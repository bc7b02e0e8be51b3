"""Self-imitation in a training step: choose from the buffer, bring rows to their ranks, push the step's successes.

The buffer decides by its index, which every rank holds; payloads live on the leaders that produced them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from spear_megatron.algorithms.recalibration import GroupStatistics
from spear_megatron.data.exchange import TensorRecord, exchange
from spear_megatron.data.files import FileEntry
from spear_megatron.data.packing import row_key
from spear_megatron.observability.lineage import Pushed, StepLineage, Used
from spear_megatron.parallel.agreement import agree_ok, gather_objects
from spear_megatron.parallel.state import ParallelState
from spear_megatron.replay.buffer import PushPlan, ReplayBuffer
from spear_megatron.replay.decisions import ReplaySelection
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.replay.payload import BYTES_PER_RECORD, BYTES_PER_TOKEN, make_payload, payload_id, replay_rows
from spear_megatron.rollout.collect import Collected
from spear_megatron.trainer.objective import merge_used
from spear_megatron.trainer.scoring import Scores
from spear_megatron.types import Row, Trajectory, TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What is replayed in one step.

    Attributes:
        gamma: coefficient of the self-imitation term.
        tokens, advantages: tokens and recalibrated advantage of every chosen trajectory.
    """

    gamma: float = 0.0
    tokens: Mapping[TrajectoryId, int] = field(default_factory=dict)
    advantages: Mapping[TrajectoryId, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    selection: ReplaySelection | None = None


NOTHING_REPLAYED = Replayed()


@dataclass
class Imitation:
    """Self-imitation on this rank. All ranks call every method in the same order.

    Attributes:
        batch_size: trajectories replayed per step; None for a quarter of those sampled.
        step_term_weight: of GiGPO's stored step term, 0 drops it.
        baseline_groups: all, or kept ones alone.
    """

    buffer: ReplayBuffer
    parallel: ParallelState
    temperature: float
    batch_size: int | None
    step_term_weight: float
    baseline_groups: Literal["all", "kept"]

    def __post_init__(self) -> None:
        self._plan = PushPlan(rejected={})
        self._expired: tuple[TrajectoryId, ...] = ()
        self._evicted: tuple[TrajectoryId, ...] = ()
        self._replayed = NOTHING_REPLAYED

    @property
    def pushed_ids(self) -> tuple[TrajectoryId, ...]:
        """What this step pushed."""
        return tuple(entry.id for entry in self._plan.accepted)

    def begin_step(self) -> None:
        """Forget the events of the step before."""
        self.__post_init__()

    def select(self, step: int, mu: float, gamma: float, num_sampled: int) -> Replayed:
        """Expire what is too old and choose what to replay; the same on every rank.

        Args:
            mu, gamma: today's coefficients of the tool-call reward and of self-imitation; without weight nothing is
                replayed.
            num_sampled: trajectories that this step sampled.
        """
        self._expired += self.buffer.expire(step)
        size = max(num_sampled // 4, 1) if self.batch_size is None else self.batch_size
        selection = self.buffer.select(step, mu, size)
        chosen = selection.chosen if gamma > 0 else ()
        ages = [step - item.entry.step for item in chosen]
        metrics = {
            "replay/qualifying": float(selection.num_qualifying),
            "replay/non_positive": float(selection.num_non_positive),
            "replay/trigger": self.buffer.trigger,
            "replay/replayed": float(len(chosen)),
        }
        if selection.p50 is not None and selection.p50_std is not None:
            metrics |= {"replay/p50": selection.p50, "replay/p50_std": selection.p50_std}
        if chosen:
            metrics |= {
                "replay/age_mean": sum(ages) / len(ages),
                "replay/age_max": float(max(ages)),
                "replay/advantage_mean": sum(item.advantage for item in chosen) / len(chosen),
            }
        self._replayed = Replayed(
            gamma=gamma,
            tokens={item.entry.id: item.entry.num_tokens for item in chosen},
            advantages={item.entry.id: item.advantage for item in chosen},
            metrics=metrics,
            selection=selection,
        )
        return self._replayed

    def fetch(self, replayed: Replayed, owner_of: Mapping[TrajectoryId, int], *, timeout_s: float) -> list[Row]:
        """Bring chosen trajectories from their shards to the ranks that train on them; this rank's rows, by id.

        With ``replay.after_use: clear`` the buffer is empty afterwards.
        """
        own = self.buffer.payloads(owner_of.keys())
        payloads = [(owner_of[key], record) for key, record in own.items()]
        records = exchange(payloads, self.parallel, phase="replay rows", timeout_s=timeout_s)
        expected = {key for key, owner in owner_of.items() if owner == self.parallel.dp_rank}
        missing = expected - {payload_id(record) for record in records}
        lost = f"no rank holds the replayed trajectories {sorted(map(str, missing))}" if missing else None
        agree_ok(self.parallel, "replay rows", lost)
        self._evicted += self.buffer.clear_after_use()
        rows = [
            row
            for record in records
            for row in replay_rows(record, replayed.advantages, step_term_weight=self.step_term_weight)
        ]
        return sorted(rows, key=row_key)

    def push(
        self, step: int, collected: Collected, scores: Scores, rows: Sequence[Row], *, timeout_s: float
    ) -> dict[str, float]:
        """Push the step's good trajectories and its group means; metrics of the buffer.

        Args:
            rows: this data-parallel rank's rows of the step, with ``old_log_probs``.
        """
        self._expired += self.buffer.expire(step)
        self._plan = self.buffer.plan_push(self._candidates(collected, scores))
        owners = {entry.id: entry.shard for entry in self._plan.accepted}
        old_log_probs = self._bring_home(rows, owners, timeout_s)
        payloads = {
            member.id: self._payload(member, scores, old_log_probs)
            for group in collected.groups
            for member in group.trajectories
            if member.id in owners
        }
        expired, evicted = self.buffer.push(step, self._plan, payloads, self._statistics(scores))
        self._expired += expired
        self._evicted += evicted
        return {
            "replay/pushed": float(len(self._plan.accepted)),
            **{f"replay/rejected/{rule}": float(len(ids)) for rule, ids in self._plan.rejected.items()},
            "replay/expired": float(len(self._expired)),
            "replay/evicted": float(len(self._evicted)),
            "replay/stored": float(len(self.buffer.entries)),
            "replay/bytes": float(self.buffer.num_bytes),
        }

    def _candidates(self, collected: Collected, scores: Scores) -> list[ReplayEntry]:
        entries = []
        for row in collected.index:
            if not scores.trains_on(row.id) or row.id in scores.masked or not sum(row.sampled_lengths):
                continue
            tokens = sum(row.segment_lengths)
            entries.append(
                ReplayEntry(
                    id=row.id,
                    shard=row.owner,
                    base=scores.base[row.id],
                    bonus=scores.bonus[row.id],
                    parts=row.reward,
                    stored_reward=scores.base[row.id] + scores.mu * scores.bonus[row.id],
                    advantage=scores.advantages[row.id],
                    num_tokens=tokens,
                    longest=max(row.segment_lengths),
                    num_sampled=sum(row.sampled_lengths),
                    num_bytes=BYTES_PER_TOKEN * tokens + BYTES_PER_RECORD,
                    temperature=self.temperature,
                )
            )
        return entries

    def _statistics(self, scores: Scores) -> list[GroupStatistics]:
        members: dict[tuple[int, int], list[TrajectoryId]] = {}
        for key in sorted(scores.counted):
            if self.baseline_groups == "all" or key.group in scores.groups:
                members.setdefault(key.group, []).append(key)
        return [
            GroupStatistics.of([scores.base[key] for key in keys], [scores.bonus[key] for key in keys], scores.mu)
            for keys in members.values()
        ]

    def _bring_home(
        self, rows: Sequence[Row], owners: Mapping[TrajectoryId, int], timeout_s: float
    ) -> dict[tuple[TrajectoryId, int], torch.Tensor]:
        """Old log-probs of accepted trajectories, from the ranks that trained on them to those that sampled them."""
        payloads = []
        for row in rows:
            if row.trajectory in owners and self.parallel.is_leader:
                assert row.old_log_probs is not None
                fields = {"trajectory": list(row.trajectory), "segment": row.segment}
                record = TensorRecord(tensors={"old_log_probs": row.old_log_probs}, fields=fields)
                payloads.append((owners[row.trajectory], record))
        records = exchange(payloads, self.parallel, phase="old log-probs of pushed trajectories", timeout_s=timeout_s)
        return {
            (TrajectoryId(*record.fields["trajectory"]), record.fields["segment"]): record.tensors["old_log_probs"]
            for record in records
        }

    def _payload(
        self, trajectory: Trajectory, scores: Scores, old_log_probs: Mapping[tuple[TrajectoryId, int], torch.Tensor]
    ) -> TensorRecord:
        keys = [(trajectory.id, segment) for segment in range(len(trajectory.segments))]
        return make_payload(
            trajectory,
            [old_log_probs[key] for key in keys],
            [scores.step_advantages.get(key, 0.0) for key in keys],
            self.temperature,
        )

    def lineage(
        self, step: int, scores: Scores, used: Sequence[Mapping[TrajectoryId, tuple[int, float]]]
    ) -> StepLineage:
        """What the step did to trajectories; collective.

        Args:
            used: :attr:`Objective.used` of every optimizer step of this rank.
        """
        own = used if self.parallel.is_leader else [{} for _ in used]
        updates = [merge_used(parts) for parts in zip(*gather_objects(self.parallel, list(own)), strict=True)]
        selection = self._replayed.selection
        chosen = {item.entry.id: item for item in selection.chosen} if selection is not None else {}
        filtered: dict[str, list[TrajectoryId]] = {}
        for key, reason in sorted(scores.masked.items()):
            filtered.setdefault(reason, []).append(key)
        return StepLineage(
            step=step,
            mu=scores.mu,
            gamma=self._replayed.gamma,
            p50=selection.p50 if selection is not None else None,
            pushed=tuple(
                Pushed(entry.id, entry.advantage, entry.stored_reward, entry.base, entry.bonus, entry.num_sampled)
                for entry in self._plan.accepted
            ),
            rejected=self._plan.rejected,
            filtered={reason: tuple(ids) for reason, ids in filtered.items()},
            expired=self._expired,
            evicted=self._evicted,
            used=tuple(
                Used(
                    id=key,
                    age=step - key.step,
                    reward=chosen[key].reward,
                    advantage=chosen[key].advantage,
                    tokens=chosen[key].entry.num_sampled,
                    selected=selected,
                    update=number,
                    weight=weight,
                )
                for number, update in enumerate(updates)
                for key, (selected, weight) in sorted(update.items())
            ),
        )

    def snapshot(self) -> tuple[dict[str, Any], list[FileEntry]]:
        """State and files for a checkpoint; see :meth:`ReplayBuffer.snapshot`."""
        return self.buffer.snapshot()
