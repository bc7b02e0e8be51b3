"""Observers of rewards, filters, estimators and replay: whole runs with scripted trajectories of many kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from observers.core import Observer, Observers
from observers.scripted_run import figure, run_scripted

from spear_megatron.config.schema import Config
from spear_megatron.types import Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_REASONS = (StopReason.ANSWER, StopReason.ANSWER, StopReason.TURN_LIMIT, StopReason.VOID_TURN, StopReason.ANSWER)


def varied(prompt: Prompt, task: TrajectoryId) -> Trajectory:
    """Two segments; reward, calls, invalid actions, end, repetition and readability follow from the id."""
    number = 5 * task.task + task.sample + task.step
    generator = torch.Generator().manual_seed(97 * task.task + task.sample)
    segments = []
    for position in range(2):
        sampled = 230 if number % 7 == 3 else 3 + number % 4
        ids = torch.randint(5, 200, (4 + sampled,), generator=generator, dtype=torch.int32)
        if number % 7 == 3:
            ids[4:] = 9
        mask = torch.arange(4 + sampled) >= 4
        log_probs = -torch.rand(4 + sampled, generator=generator) * mask
        segments.append(
            Segment(
                ids, mask, log_probs, observation_key=f"room {position * (number % 2)}", reward=float(number % 3 == 0),
                num_invalid_actions=number % 2,
            )  # fmt: skip
        )
    won = number % 3 == 0
    parts = RewardParts(
        outcome=float(won) + 0.01 * (number % 5), num_tool_calls=2 + 3 * (number % 2), success=won,
        num_tool_turns=1 + number % 2, num_invalid_actions=2 * (number % 2),
    )  # fmt: skip
    text = "\ufffd" if number % 6 == 1 else f"\\boxed{{{number}}}"
    return Trajectory(
        task, tuple(segments), parts, _REASONS[number % len(_REASONS)], 0, num_turns=2, num_tool_turns=1 + number % 2,
        num_tool_calls=2 + 3 * (number % 2), messages=({"role": "assistant", "content": text},),
    )  # fmt: skip


def single(prompt: Prompt, task: TrajectoryId) -> Trajectory:
    """As :func:`varied`, but only the first sample of a group survives its infrastructure."""
    made = varied(prompt, task)
    if task.sample == 0:
        return made
    from dataclasses import replace

    return replace(made, stop_reason=StopReason.INFRASTRUCTURE, error="lost")


def without_spread(prompt: Prompt, task: TrajectoryId) -> Trajectory:
    """As :func:`varied`, but two of three groups have equal rewards."""
    from dataclasses import replace

    made = varied(prompt, task)
    return made if task.task % 3 == 0 else replace(made, reward=RewardParts(1.0, success=True))


def losses(config: Config, scratch: Path) -> Any:
    """Loss of every step."""
    return [line.get("actor/loss") for line in run_scripted(config, varied).record]


def replay(config: Config, scratch: Path) -> Any:
    """What was replayed in which update, and the figures of the buffer."""
    run = run_scripted(config, varied)
    figures = [
        {name: value for name, value in line.items() if name.startswith(("replay/", "spear/"))} for line in run.record
    ]
    return run.replayed, figures


def segment_files(config: Config, scratch: Path) -> Any:
    """Number of files of the buffer."""
    run_scripted(config, varied)
    return len(list((scratch / "run" / "replay").rglob("segment_*")))


_REWARDS = figure("critic/rewards/mean", "critic/rewards/max", make=varied)
_ADVANTAGES = figure("critic/advantages/max", "critic/advantages/min", make=varied)
_LONG = (
    "data.max_response_length=1024", f"{_ACTOR}.ppo_max_token_len_per_gpu=2048", f"{_ROLLOUT}.n=4",
    "actor_rollout_ref.rollout.max_model_len=1600", "trainer.total_training_steps=2",
)  # fmt: skip
_COSINE = (*_LONG, "algorithm.use_toolcall_reward=cosine")
_CONSTANT = (*_LONG, "algorithm.use_toolcall_reward=constant")
_GIGPO = (*_LONG, "algorithm.adv_estimator=gigpo", "algorithm.gamma=0.9", "trainer.total_training_steps=1")
_FILTERS = tuple(
    f"algorithm.filter_{name}_responses=true" for name in ("overlong", "incomplete", "repetitive", "unreadable")
)
_REPLAY = (
    *_LONG, f"{_ACTOR}.enable_trajectory_replay=true", f"{_ACTOR}.trajectory_buffer_size=3",
    f"{_ACTOR}.max_replay_loss_steps=4", f"{_ACTOR}.replay.batch_size=2", f"{_ACTOR}.baseline_buffer_size=6",
    f"{_ACTOR}.replay.trigger_ratio=0", "trainer.total_training_steps=4", "data.train_batch_size=2",
)  # fmt: skip


def _reward(field: str, one: str, other: str, *given: str) -> tuple[str, Observer]:
    return field, Observer(_REWARDS, (one, other), given or _LONG)


def _filter(field: str) -> tuple[str, Observer]:
    key = f"algorithm.filter_{field}_responses"
    return key, Observer(figure(f"filter/{field}", "actor/tokens", make=varied), ("false", "true"), _LONG)


def _replay(field: str, one: str, other: str, *given: str) -> tuple[str, Observer]:
    return f"{_ACTOR}.{field}", Observer(replay, (one, other), (*_REPLAY, *given))


OBSERVERS: Observers = dict(
    [
        _reward("algorithm.use_toolcall_reward", "none", "constant"),
        _reward("algorithm.max_toolcall_steps", "100", "3", *_COSINE),
        _reward("algorithm.toolcall_reward_form", "per_turn", "per_call", *_CONSTANT),
        _reward("algorithm.toolcall_reward_max", "1.0", "0.15", *_CONSTANT),
        _reward("algorithm.format_reward", "0.0", "0.1"),
        _reward(f"{_ACTOR}.use_invalid_action_penalty", "false", "true"),
        _reward(
            f"{_ACTOR}.invalid_action_penalty_coef", "0.1", "0.3", *_LONG, f"{_ACTOR}.use_invalid_action_penalty=true"
        ),
        *(_filter(name) for name in ("overlong", "incomplete", "repetitive", "unreadable")),
        ("algorithm.filtered_in_statistics", Observer(_ADVANTAGES, ("true", "false"), (*_LONG, *_FILTERS))),
        (
            "algorithm.singleton_advantage",
            Observer(figure("critic/advantages/max", make=single), ("zero", "reward"), _LONG),
        ),
        ("algorithm.gamma", Observer(losses, ("0.9", "0.1"), _GIGPO)),
        ("algorithm.gigpo.step_advantage_w", Observer(losses, ("1.0", "0.2"), _GIGPO)),
        ("algorithm.gigpo.mode", Observer(losses, ("mean_norm", "mean_std_norm"), _GIGPO)),
        (
            "algorithm.filter_groups.enable",
            Observer(
                figure("training/num_groups", "filter/gen_batches", make=without_spread), ("false", "true"), _LONG
            ),
        ),
        (
            "algorithm.filter_groups.max_num_gen_batches",
            Observer(
                figure("training/num_groups", "filter/gen_batches", make=without_spread),
                ("10", "1"),
                (*_LONG, "algorithm.filter_groups.enable=true"),
            ),
        ),
        (
            f"{_ROLLOUT}.rollout_filter_ratio",
            Observer(figure("filter/groups_dropped", "actor/tokens", make=varied), ("1.0", "0.5"), _LONG),
        ),
        (
            f"{_ROLLOUT}.rollout_filter_type",
            Observer(
                figure("actor/loss", "actor/tokens", make=without_spread),
                ("std", "std_rev"),
                (*_LONG, f"{_ROLLOUT}.rollout_filter_ratio=0.5"),
            ),
        ),
        (f"{_ACTOR}.old_log_prob", Observer(losses, ("trainer", "rollout"), _LONG)),
        _replay("enable_trajectory_replay", "true", "false"),
        _replay("trajectory_buffer_size", "3", "1"),
        _replay("trajectory_score_threshold", "0.0", "1.2"),
        _replay("trajectory_tolerate_steps", "10", "0"),
        _replay("replay_loss_coef", "1.0", "0.5"),
        _replay("max_replay_loss_steps", "4", "8"),
        _replay("weight_decay_trajectory_replay", "-1.0", "0.5"),
        _replay("baseline_buffer_size", "6", "1"),
        _replay("replay.update", "joint", "separate"),
        _replay("replay.require", "success", "none", f"{_ROLLOUT}.n=2"),
        _replay("replay.trigger_ratio", "0", "1.0", f"{_ACTOR}.trajectory_buffer_size=30"),
        _replay(
            "replay.trigger_count", "stored", "qualifying", f"{_ACTOR}.replay.trigger_ratio=1.0",
            f"{_ACTOR}.weight_decay_trajectory_replay=1.0",
        ),  # fmt: skip
        _replay("replay.capacity_ratio", "1.0", "0.4"),
        _replay("replay.max_gib", "32.0", "1e-6"),
        _replay("replay.batch_size", "2", "1"),
        _replay(
            "replay.power_of_two", "false", "true", f"{_ACTOR}.replay.batch_size=3", f"{_ACTOR}.replay.require=none"
        ),
        _replay("replay.after_use", "keep", "clear"),
        _replay("replay.staleness", "exact", "released", f"{_ACTOR}.trajectory_tolerate_steps=1"),
        _replay(
            "replay.recompose", "today", "stored", "algorithm.use_toolcall_reward=cosine",
            "algorithm.max_toolcall_steps=4",
        ),  # fmt: skip
        _replay("replay.sampling", "uniform", "prioritized", f"{_ACTOR}.replay.batch_size=1"),
        _replay(
            "replay.baseline_groups", "all", "kept", f"{_ROLLOUT}.rollout_filter_ratio=0.5", "data.train_batch_size=2"
        ),
        _replay("replay.step_term", "keep", "drop", "algorithm.adv_estimator=gigpo"),
        (f"{_ACTOR}.replay.segment_mib", Observer(segment_files, ("64.0", "1e-4"), _REPLAY)),
    ]
)
