"""Whether replay can ever happen: bounds on what a buffer may hold and on what an advantage may be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spear_megatron.algorithms.rounding import floor_share
from spear_megatron.replay.decisions import ReplayRules

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config

_ACTOR = "actor_rollout_ref.actor"


def replay_rules(config: Config) -> ReplayRules:
    """What the buffer decides by.

    A recalibrated advantage has the scale of the estimator's episode term. The released code, which drops GiGPO's step
    term, scales it as it does GRPO's.
    """
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    by_std = algorithm.norm_adv_by_std_in_grpo
    if algorithm.adv_estimator == "gigpo" and actor.replay.step_term == "keep":
        by_std = algorithm.gigpo.mode == "mean_std_norm"
    elif algorithm.adv_estimator in ("rloo", "reinforce_plus_plus"):
        by_std = False
    return ReplayRules(
        buffer_size=actor.trajectory_buffer_size,
        score_threshold=actor.trajectory_score_threshold,
        tolerate_steps=actor.trajectory_tolerate_steps,
        weight_decay=actor.weight_decay_trajectory_replay,
        norm_by_std=by_std,
        replay=actor.replay,
    )


def most_stored(config: Config) -> int:
    """Most trajectories that the buffer can hold when replay is decided, were every trajectory pushed.

    A step pushes after its update, so what is there is that of earlier steps: ``trajectory_tolerate_steps`` of them,
    or two more of at most 10 as the released code counts.
    """
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    tolerance = actor.trajectory_tolerate_steps
    steps = min(tolerance, 10) + 2 if actor.replay.staleness == "released" else tolerance
    groups = max(1, floor_share(rollout.rollout_filter_ratio, config.data.train_batch_size))
    stored = steps * groups * rollout.n
    bound = replay_rules(config).capacity
    return stored if bound is None else min(stored, bound)


def check_trigger(config: Config) -> None:
    """Replay that is switched on must be able to happen.

    Raises:
        ValueError: the buffer cannot reach the trigger; names the keys and what to change.
    """
    actor = config.actor_rollout_ref.actor
    if not actor.enable_trajectory_replay:
        return
    most, needed = most_stored(config), replay_rules(config).trigger
    # Qualifying trajectories must be more than the trigger, stored ones as many.
    if most < 1 or most < needed or (actor.replay.trigger_count == "qualifying" and most <= needed):
        raise ValueError(
            f"{_ACTOR}.enable_trajectory_replay=true never replays: the buffer reaches at most {most} trajectories in "
            f"{_ACTOR}.trajectory_tolerate_steps={actor.trajectory_tolerate_steps} steps, and {_ACTOR}.replay."
            f"trigger_ratio={actor.replay.trigger_ratio} waits for {needed:g}: lower {_ACTOR}.trajectory_buffer_size="
            f"{actor.trajectory_buffer_size} or the ratio, or tolerate more steps"
        )


def most_advantage(config: Config) -> float | None:
    """Largest advantage that a trajectory can have, None where that is not known from the configuration.

    Known for group-relative estimators of the built-in math reward: one trajectory with everything that can be earned
    in a group of ``rollout.n`` whose others have the least.
    """
    algorithm, actor, n = config.algorithm, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    if config.reward.name != "math" or algorithm.adv_estimator not in ("grpo", "rloo") or n < 2:
        return None
    if algorithm.use_kl_in_reward or actor.use_invalid_action_penalty:
        return None
    kwargs = config.reward.kwargs
    bonus = algorithm.toolcall_reward_max
    if algorithm.toolcall_reward_form == "any_if_correct":
        bonus = max(1.0, bonus)
    earned = float(kwargs.get("correct", 1.0)) - float(kwargs.get("wrong", 0.0)) + algorithm.format_reward
    if algorithm.use_toolcall_reward != "none":
        earned += bonus
    if algorithm.adv_estimator == "rloo":
        return earned
    normalised = algorithm.norm_adv_by_std_in_grpo
    most = (n - 1) / math.sqrt(n) if normalised else earned * (n - 1) / n  # the sample deviation is earned / sqrt(n)
    alone = earned + float(kwargs.get("wrong", 0.0)) if algorithm.singleton_advantage == "reward" else most
    return max(most, alone)


def config_warnings(config: Config) -> list[str]:
    """What can run but most likely is not meant, one sentence each."""
    actor = config.actor_rollout_ref.actor
    found = []
    most = most_advantage(config)
    if actor.enable_trajectory_replay and most is not None and actor.trajectory_score_threshold >= most:
        found.append(
            f"{_ACTOR}.trajectory_score_threshold={actor.trajectory_score_threshold} lets no trajectory into the "
            f"replay buffer: with these rewards an advantage is at most {most:.3g}; lower it (0: all above the mean)"
        )
    if actor.enable_trajectory_replay and actor.replay_loss_coef == 0:
        found.append(f"{_ACTOR}.replay_loss_coef=0 gives replayed trajectories no weight: raise it to imitate them")
    return found
