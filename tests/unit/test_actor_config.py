"""Keys of actor_rollout_ref.actor: defaults that follow each other, and one clear sentence for a bad value."""

from __future__ import annotations

from typing import Any

import pytest

from spear_megatron.trainer.config import ActorConfig, OptimConfig


def test_one_clip_ratio_serves_both_sides_until_a_side_is_set() -> None:
    assert ActorConfig(clip_ratio=0.1).clip_range == (0.1, 0.1)
    assert ActorConfig(clip_ratio=0.1, clip_ratio_high=0.28).clip_range == (0.1, 0.28)
    assert ActorConfig(clip_ratio_low=0.0).clip_range == (0.0, 0.2)


@pytest.mark.parametrize(
    "fields",
    [
        {"ppo_mini_batch_size": 0},
        {"ppo_epochs": 0},
        {"ppo_max_token_len_per_gpu": -1},
        {"clip_ratio": -0.1},
        {"clip_ratio_high": -0.1},
        {"clip_ratio_c": 1.0},
        {"loss_agg_mode": "mean"},
        {"kl_loss_coef": -1.0},
        {"kl_loss_type": "k9"},
        {"kernels": "fast"},
    ],
    ids=str,
)
def test_bad_values_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"actor_rollout_ref.actor.{next(iter(fields))}"):
        ActorConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0.0},
        {"min_lr": 1.0},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"lr_decay_style": "step"},
    ],
    ids=str,
)
def test_bad_optimizer_values_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"actor_rollout_ref.actor.optim.{next(iter(fields))}"):
        OptimConfig(**fields)


@pytest.mark.parametrize("key", ["weight_decay", "clip_grad", "lr_warmup_steps"])
def test_negative_optimizer_values_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        OptimConfig(**{key: -1})
