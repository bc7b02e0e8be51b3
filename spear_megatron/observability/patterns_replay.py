"""Failure patterns of self-imitation: a buffer that is never used, replay without effect, bounds that select nothing.

Every check takes a record and returns a finding with figures, steps and the keys to change, or None.
"""

from __future__ import annotations

import math

from spear_megatron.observability.findings import Finding
from spear_megatron.observability.trends import WINDOW, Record, Window, is_solved, series, tail

_ACTOR = "actor_rollout_ref.actor"
_LOSS = f"{_ACTOR}.policy_loss"
_REPLAY = f"{_ACTOR}.replay"
_SIZE = f"{_ACTOR}.trajectory_buffer_size"
_PATIENCE = 4 * WINDOW
_RULES = {
    "advantage": (f"{_ACTOR}.trajectory_score_threshold", "lower {key}; without any variance in the groups no "
                  "advantage is above it, then use tasks that are sometimes solved"),
    "requirement": (f"{_REPLAY}.require", "set {key}=none, or use tasks that the agent solves, with its tools, at "
                    "least sometimes"),
}  # fmt: skip


def never_replayed(record: Record) -> Finding | None:
    """The buffer is kept, trajectories enter it, and in twenty steps and more none was replayed."""
    replayed, stored = series(record, "replay/replayed"), series(record, "replay/stored")
    pushed = sum(value for _, value in series(record, "replay/pushed"))
    if len(stored) < _PATIENCE or any(value for _, value in replayed) or not pushed:
        return None
    needed = series(record, "replay/trigger")
    step, most = max(stored, key=lambda point: point[1])
    evidence = f"nothing was replayed in steps {stored[0][0]}-{stored[-1][0]}; replay/stored reached {most:.0f} "
    evidence += f"at step {step}"
    evidence += f", replay/trigger is {needed[-1][1]:.0f}" if needed else ""
    qualifying = series(record, "replay/qualifying")
    best = max((value for _, value in qualifying), default=math.inf)
    if best < most:
        evidence += f", replay/qualifying at most {best:.0f}"
    if best == 0:
        keys: tuple[str, ...] = (f"{_REPLAY}.recompose", f"{_ACTOR}.weight_decay_trajectory_replay")
        remedy = (
            f"no reward is above the baseline replay/p50: check that {keys[0]} is today, or replay by the stored "
            f"advantages with {keys[1]} between 0 and 1"
        )
        return Finding("warning", "replay never triggered", evidence, remedy, keys)
    losses = _losses(record)
    keys = (_SIZE, f"{_REPLAY}.trigger_ratio")
    remedy = f"lower {keys[0]} or {keys[1]}"
    if losses is not None:
        evidence += f"; as many leave by age ({losses[1]}) as enter ({losses[0]})"
        keys = (*keys, f"{_ACTOR}.trajectory_tolerate_steps")
        remedy += f", or raise {keys[-1]}"
    return Finding("warning", "replay never triggered", evidence, remedy, keys)


def _losses(record: Record) -> tuple[Window, Window] | None:
    """(pushed, expired) of the last steps, if the buffer has stopped growing for expiry."""
    pushed, expired = tail(record, "replay/pushed"), tail(record, "replay/expired")
    if pushed is None or expired is None or expired.value < 0.8 * pushed.value or expired.value == 0:
        return None
    return pushed, expired


def replay_without_weight(record: Record) -> Finding | None:
    """Trajectories are replayed, and their term has the coefficient 0."""
    replayed, gamma = tail(record, "replay/replayed"), tail(record, "spear/gamma")
    if replayed is None or gamma is None or replayed.value == 0 or gamma.value > 1e-8:
        return None
    keys = (f"{_ACTOR}.replay_loss_coef", f"{_ACTOR}.enable_trajectory_replay")
    return Finding(
        "warning",
        "replay without weight",
        f"replay/replayed is {replayed}, spear/gamma {gamma}: replay costs time and changes nothing",
        f"raise {keys[0]}, or set {keys[1]}=false",
        keys,
    )


def covariance_selects_nothing(record: Record) -> Finding | None:
    """The bounds of the covariance never hold a token of the policy's own rollouts."""
    points = series(record, "cov/candidates")
    keys = (f"{_LOSS}.clip_cov_lb", f"{_LOSS}.clip_cov_ub", f"{_LOSS}.clip_cov_bounds")
    return _no_candidates("cov/candidates", points, "covariance selection finds no token", keys)


def replay_covariance_selects_nothing(record: Record) -> Finding | None:
    """The bounds of the covariance never hold a replayed token, in the steps that replay."""
    busy = {step for step, value in series(record, "replay/replayed") if value}
    points = [point for point in series(record, "cov/replay_candidates") if point[0] in busy]
    keys = (f"{_LOSS}.clip_cov_lb_replay", f"{_LOSS}.clip_cov_ub_replay", f"{_LOSS}.clip_cov_bounds")
    return _no_candidates("cov/replay_candidates", points, "covariance selection finds no replayed token", keys)


def _no_candidates(
    metric: str, points: list[tuple[int, float]], name: str, keys: tuple[str, str, str]
) -> Finding | None:
    if len(points) < 2 * WINDOW or any(value for _, value in points):
        return None
    return Finding(
        "warning",
        name,
        f"{metric} is 0 in all {len(points)} steps from {points[0][0]} to {points[-1][0]}",
        f"lower {keys[0]} or raise {keys[1]}, or let the bounds follow the data with {keys[2]}=quantile",
        keys,
    )


def baseline_not_finite(record: Record) -> Finding | None:
    """The median of the group means is not a number: every recalibrated advantage is lost."""
    names = ("replay/p50", "replay/p50_std")
    bad = [line["step"] for line in record if line["step"] > 0 and any(line.get(name, 0.0) is None for name in names)]
    if not bad:
        return None
    key = f"{_ACTOR}.weight_decay_trajectory_replay"
    return Finding(
        "error",
        "replay baseline not finite",
        f"replay/p50 or replay/p50_std is not finite in {len(bad)} steps, first at step {bad[0]}, last at {bad[-1]}",
        "look for rewards that are not finite (critic/rewards/mean, the reward function); until then "
        f"{key} between 0 and 1 replays without the baseline",
        (key,),
    )


def all_pushes_rejected(record: Record) -> Finding | None:
    """Nothing enters the buffer, and one rule keeps it all out."""
    recent = [line for line in record if line["step"] > 0 and line.get("replay/pushed") is not None][-2 * WINDOW :]
    if len(recent) < 2 * WINDOW or any(line["replay/pushed"] for line in recent) or is_solved(record):
        return None
    totals: dict[str, float] = {}
    for line in recent:
        for name, value in line.items():
            if name.startswith("replay/rejected/") and value:
                totals[name] = totals.get(name, 0.0) + value
    if not totals:
        return None
    name = max(totals, key=totals.__getitem__)
    if totals[name] < 0.9 * sum(totals.values()):
        return None
    key, remedy = _RULES.get(name.rpartition("/")[2], (f"{_REPLAY}.require", "check {key}"))
    return Finding(
        "warning",
        "one rule rejects every push",
        f"{name} is {totals[name]:.0f} and replay/pushed 0 over steps {recent[0]['step']}-{recent[-1]['step']}",
        remedy.format(key=key),
        (key,),
    )
