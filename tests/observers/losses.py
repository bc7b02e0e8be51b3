"""Observers of the policy losses: real updates on on-policy and replayed rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from observers.actor import built, rows
from observers.core import Observer, Observers

from spear_megatron.config.schema import Config
from spear_megatron.trainer.objective import ReplayTerm, UpdateKey
from spear_megatron.types import Row, TrajectoryId

_ACTOR = "actor_rollout_ref.actor"
_LOSS = f"{_ACTOR}.policy_loss"
_CORRECTION = "algorithm.rollout_correction"


def segments() -> list[Row]:
    """Rows of which two belong to one trajectory."""
    made = rows()
    return [*made[:3], replace(made[3], trajectory=made[2].trajectory, segment=1)]


def replayed() -> list[Row]:
    """Rows of an earlier step."""
    made = enumerate(rows(7))
    return [replace(row, trajectory=TrajectoryId(-2, 0, i), advantages=row.advantages.abs()) for i, row in made]


def joint_update(config: Config, scratch: Path) -> Any:
    """Figures of one update with replayed rows, and which tokens of which row the covariance selected."""
    with built(config) as actor:
        term, key = ReplayTerm(rows=replayed(), coefficient=0.5), UpdateKey(3, 1)
        objective, figures, norm = actor.policy_gradients(segments(), replay=term, key=key)
        chosen = [int(torch.sum(item.selected)) for item in objective.rows if item.selected is not None]
        return figures.sums["loss"], norm, objective.metrics, chosen


def _observed(field: str, one: str, other: str, *given: str) -> tuple[str, Observer]:
    return field, Observer(joint_update, (one, other), given)


_CLIP = (f"{_LOSS}.loss_mode=clip-cov", f"{_LOSS}.clip_cov_ratio=0.1", f"{_LOSS}.clip_cov_ratio_replay=0.1")
_WIDE = (
    f"{_LOSS}.clip_cov_lb=-50", f"{_LOSS}.clip_cov_ub=50", f"{_LOSS}.clip_cov_lb_replay=-50",
    f"{_LOSS}.clip_cov_ub_replay=50",
)  # fmt: skip
_CLIP_WIDE = (*_CLIP, *_WIDE)
_KL = (f"{_LOSS}.loss_mode=kl-cov",)
_QUANTILE = (*_CLIP, f"{_LOSS}.clip_cov_bounds=quantile")
_SUM_NORM = f"{_ACTOR}.loss_agg_mode=seq-mean-token-sum-norm"
OBSERVERS: Observers = dict(
    [
        _observed(f"{_LOSS}.loss_mode", "vanilla", "gpg"),
        _observed(f"{_LOSS}.loss_mode_replay", "null", "gpg"),
        _observed(f"{_LOSS}.clip_cov_ratio", "0.1", "0.3", *_CLIP_WIDE),
        _observed(f"{_LOSS}.clip_cov_lb", "-50", "0.5", *_CLIP_WIDE),
        _observed(f"{_LOSS}.clip_cov_ub", "50", "-0.5", *_CLIP_WIDE),
        _observed(f"{_LOSS}.clip_cov_ratio_replay", "0.1", "0.3", *_CLIP_WIDE),
        _observed(f"{_LOSS}.clip_cov_lb_replay", "-50", "0.01", *_CLIP_WIDE),
        _observed(f"{_LOSS}.clip_cov_ub_replay", "50", "0.01", *_CLIP_WIDE),
        _observed(f"{_LOSS}.kl_cov_ratio", "0.1", "0.4", *_KL),
        _observed(f"{_LOSS}.kl_cov_ratio_replay", "0.1", "0.4", *_KL),
        _observed(f"{_LOSS}.ppo_kl_coef", "0.1", "1.0", *_KL),
        _observed(f"{_LOSS}.cov_scope", "mini_batch", "micro_batch", *_CLIP_WIDE),
        _observed(f"{_LOSS}.clip_cov_bounds", "fixed", "quantile", *_CLIP_WIDE),
        _observed(f"{_LOSS}.clip_cov_lb_quantile", "0.1", "0.7", *_QUANTILE),
        _observed(f"{_LOSS}.clip_cov_ub_quantile", "0.95", "0.85", *_QUANTILE),
        _observed(f"{_ACTOR}.loss_rows", "trajectory", "segment", f"{_ACTOR}.loss_agg_mode=seq-mean-token-mean"),
        _observed(f"{_ACTOR}.sum_norm_denominator", "rows", "micro_batch_share", _SUM_NORM),
        _observed(f"{_ACTOR}.replay.entropy_bonus", "false", "true", f"{_ACTOR}.entropy_coeff=0.1"),
        _observed(f"{_CORRECTION}.mode", "none", "tis"),
        _observed(f"{_CORRECTION}.cap", "2.0", "1.1", f"{_CORRECTION}.mode=tis"),
        _observed(f"{_CORRECTION}.low", "0.5", "0.9", f"{_CORRECTION}.mode=icepop"),
        _observed(f"{_CORRECTION}.high", "2.0", "1.1", f"{_CORRECTION}.mode=icepop"),
    ]
)
