"""The doctor: reads a run's record for known failure patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spear_megatron.observability import patterns_machine as machine
from spear_megatron.observability import patterns_mismatch as mismatch
from spear_megatron.observability import patterns_policy as policy
from spear_megatron.observability import patterns_replay as replay
from spear_megatron.observability import patterns_rollout as rollout
from spear_megatron.observability.findings import LEVELS, Finding
from spear_megatron.observability.record import read_record
from spear_megatron.observability.trends import Record

CHECKS: tuple[Callable[[Record], Finding | None], ...] = (
    policy.entropy_collapse,
    policy.entropy_explosion,
    policy.rollout_drift,
    mismatch.mismatch_warned,
    mismatch.mismatch_masked,
    mismatch.mismatch_blind,
    policy.zero_variance,
    policy.grad_norm_spikes,
    policy.nonfinite_steps,
    policy.skipped_steps,
    policy.reward_flat,
    policy.success_fell,
    policy.large_updates,
    rollout.tools_without_success,
    rollout.no_tool_calls,
    rollout.tool_failures,
    rollout.length_clip,
    rollout.length_explosion,
    rollout.dominant_phase,
    machine.straggler,
    machine.loss_spikes,
    replay.never_replayed,
    replay.replay_without_weight,
    replay.covariance_selects_nothing,
    replay.replay_covariance_selects_nothing,
    replay.baseline_not_finite,
    replay.all_pushes_rejected,
)


def diagnose_run(run_dir: str | Path) -> list[Finding]:
    """Failure patterns in the record of ``run_dir``, the gravest first; empty if none is seen.

    Raises:
        FileNotFoundError: the folder has no record.
        ValueError: the record is damaged.
    """
    hung = machine.hangs(run_dir)
    return ([hung] if hung is not None else []) + diagnose_record(read_record(run_dir))


def diagnose_record(record: Record) -> list[Finding]:
    """Failure patterns in the lines of a record, the gravest first."""
    found = [finding for check in CHECKS if (finding := check(record)) is not None]
    found += rollout.bad_stops(record)
    return sorted(found, key=lambda finding: -LEVELS.index(finding.level))
