"""Failure patterns of the policy update: entropy, gradients, progress.

Every check takes a record and returns a finding with figures, steps and the keys to change, or None.
"""

from __future__ import annotations

from statistics import median

from spear_megatron.observability.findings import Finding
from spear_megatron.observability.trends import WINDOW, Record, head, is_solved, series, tail, window

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_LR = f"{_ACTOR}.optim.lr"


def entropy_collapse(record: Record) -> Finding | None:
    """The policy became nearly deterministic before it solved the tasks."""
    first, last = head(record, "actor/entropy"), tail(record, "actor/entropy")
    if first is None or last is None or is_solved(record) or last.value > min(0.3 * first.value, 0.1):
        return None
    keys = (f"{_ACTOR}.clip_ratio_high", f"{_ACTOR}.entropy_coeff", _LR)
    return Finding(
        "warning",
        "entropy collapse",
        f"actor/entropy fell from {first} to {last} while tasks remain unsolved",
        f"raise {keys[0]} (0.28 is common), set {keys[1]} to a small value such as 0.001, or lower {keys[2]}",
        keys,
    )


def entropy_explosion(record: Record) -> Finding | None:
    """The policy drifts towards noise."""
    first, last = head(record, "actor/entropy"), tail(record, "actor/entropy")
    if first is None or last is None or last.value < max(2 * first.value, first.value + 0.5):
        return None
    keys = (f"{_ACTOR}.entropy_coeff", _LR)
    return Finding(
        "warning",
        "entropy explosion",
        f"actor/entropy rose from {first} to {last}",
        f"lower {keys[0]} and {keys[1]}; check the train/rollout difference too",
        keys,
    )


def rollout_drift(record: Record) -> Finding | None:
    """Engine and trainer disagree on the log-probs of the sampled tokens."""
    last = tail(record, "training/rollout_logp_abs_diff/mean")
    # Where the gate warned, its own finding tells more.
    if last is None or last.value < 0.05 or any(line.get("mismatch/warned") for line in record):
        return None
    key = "actor_rollout_ref.model.dtype"
    return Finding(
        "warning",
        "train/rollout drift",
        f"training/rollout_logp_abs_diff/mean is {last} nats; below 0.05 is usual",
        f"try {key}=fp32; if the difference stays, engine and trainer hold other weights or temperatures",
        (key,),
    )


def zero_variance(record: Record) -> Finding | None:
    """Nearly all groups have equal rewards, so that nothing is learned."""
    groups, success = tail(record, "groups/zero_variance"), tail(record, "success/mean")
    if groups is None or success is None or groups.value < 0.8 or is_solved(record):
        return None
    keys = ("data.generator.levels", f"{_ROLLOUT}.n")
    easier = "easier" if success.value < 0.5 else "harder"
    return Finding(
        "warning",
        "groups without variance",
        f"groups/zero_variance is {groups}: those groups have only zero advantages; success/mean is {success}",
        f"use {easier} tasks ({keys[0]}), more samples per prompt ({keys[1]}), or a better cold start",
        keys,
    )


def grad_norm_spikes(record: Record) -> Finding | None:
    """Single steps with a gradient far above the usual."""
    points = series(record, "actor/grad_norm")
    spikes = []
    for index in range(WINDOW, len(points)):
        usual = median(value for _, value in points[max(0, index - 20) : index])
        if usual > 0 and points[index][1] > 10 * usual:
            spikes.append((*points[index], usual))
    if not spikes or (len(spikes) < 3 and max(value / usual for _, value, usual in spikes) < 100):
        return None
    step, value, usual = max(spikes, key=lambda spike: spike[1] / spike[2])
    keys = (_LR, f"{_ACTOR}.optim.clip_grad")
    return Finding(
        "warning",
        "grad-norm spikes",
        f"{len(spikes)} steps have actor/grad_norm above 10 times the median before them; the largest is {value:.3g} "
        f"at step {step} against {usual:.3g}",
        f"lower {keys[0]} or {keys[1]}, and look at the trajectories of step {step}",
        keys,
    )


def nonfinite_steps(record: Record) -> Finding | None:
    """Optimizer steps were skipped for a non-finite loss or gradient."""
    points = series(record, "training/nonfinite_steps")
    bad = [step for (_, before), (step, count) in zip([(0, 0.0), *points], points) if count > before]
    if not bad:
        return None
    keys = (_LR, "actor_rollout_ref.model.dtype")
    return Finding(
        "error",
        "non-finite steps",
        f"training/nonfinite_steps rose {len(bad)} times, first at step {bad[0]}, last at step {bad[-1]}",
        f"lower {keys[0]}, try {keys[1]}=fp32, and inspect the batch that was saved",
        keys,
    )


def skipped_steps(record: Record) -> Finding | None:
    """Too often nothing was left to learn from."""
    points = series(record, "training/skipped_steps")
    if len(points) < 2 * WINDOW or points[-1][1] < 0.2 * len(points) or is_solved(record):
        return None
    keys = (f"{_ROLLOUT}.n", "data.train_batch_size")
    return Finding(
        "warning",
        "steps without an update",
        f"{points[-1][1]:.0f} optimizer steps were skipped up to step {points[-1][0]} because no row was left",
        f"raise {keys[0]} or {keys[1]}, or use tasks that are sometimes solved",
        keys,
    )


def reward_flat(record: Record) -> Finding | None:
    """Twenty steps and more, and no progress."""
    points = series(record, "success/mean") or series(record, "critic/rewards/mean")
    if len(points) < 4 * WINDOW or is_solved(record):
        return None
    third = len(points) // 3
    first, last = window(points[:third]), window(points[-third:])
    if last.value > first.value + 0.02 + 0.02 * abs(first.value):
        return None
    keys = (_LR, f"{_ROLLOUT}.n")
    return Finding(
        "warning",
        "no progress",
        f"success went from {first} to {last}",
        f"raise {keys[0]} or {keys[1]}, or use tasks that are solved in some but not all samples",
        keys,
    )


def success_fell(record: Record) -> Finding | None:
    """The agent was clearly better before."""
    points = series(record, "success/mean")
    if len(points) < 2 * WINDOW:
        return None
    windows = [window(points[start : start + WINDOW]) for start in range(len(points) - WINDOW + 1)]
    best, last = max(windows), windows[-1]
    if last.value > best.value - 0.25:
        return None
    keys = (_LR, f"{_ACTOR}.use_kl_loss")
    return Finding(
        "warning",
        "success fell",
        f"success/mean fell from {best} to {last}",
        f"go back to the checkpoint of step {best.last} and lower {keys[0]}, or set {keys[1]}=true",
        keys,
    )


def large_updates(record: Record) -> Finding | None:
    """One step moves the policy too far."""
    kl, clipped = tail(record, "actor/ppo_kl"), tail(record, "actor/pg_clipfrac")
    if (kl is None or abs(kl.value) < 0.1) and (clipped is None or clipped.value < 0.4):
        return None
    parts = [f"{name} is {value}" for name, value in (("actor/ppo_kl", kl), ("actor/pg_clipfrac", clipped)) if value]
    keys = (_LR, f"{_ACTOR}.ppo_epochs")
    return Finding(
        "warning",
        "updates too large",
        " and ".join(parts),
        f"lower {keys[0]} or {keys[1]}, or take fewer optimizer steps per step ({_ACTOR}.ppo_mini_batch_size)",
        (*keys, f"{_ACTOR}.ppo_mini_batch_size"),
    )
