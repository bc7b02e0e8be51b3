"""Every key that the README of SPEAR documents loads as it stands and lands in the field of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from spear_megatron.config.describe import flatten
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config

ACTOR, ROLLOUT, LOSS = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.actor.policy_loss"
BLOCKS: dict[str, dict[str, Any]] = {
    "self-imitation": {
        f"{ACTOR}.enable_trajectory_replay": False,
        f"{ACTOR}.trajectory_buffer_size": 2048,
        f"{ACTOR}.trajectory_score_threshold": 1,
        f"{ACTOR}.trajectory_tolerate_steps": 10,
        f"{ACTOR}.replay_loss_coef": 1,
        f"{ACTOR}.max_replay_loss_steps": 200,
    },
    "recalibration": {f"{ACTOR}.weight_decay_trajectory_replay": -1, f"{ACTOR}.baseline_buffer_size": 10240},
    "regularisation": {
        f"{LOSS}.loss_mode": "vanilla",
        f"{LOSS}.clip_cov_ratio": 0.02,
        f"{LOSS}.clip_cov_lb": 1.0,
        f"{LOSS}.clip_cov_ub": 40.0,
        f"{LOSS}.kl_cov_ratio": 0.02,
        f"{LOSS}.clip_cov_ratio_replay": 0.02,
        f"{LOSS}.clip_cov_lb_replay": 1.0,
        f"{LOSS}.clip_cov_ub_replay": 40.0,
        f"{LOSS}.kl_cov_ratio_replay": 0.02,
    },
    "intrinsic reward": {"algorithm.use_toolcall_reward": "cosine", "algorithm.max_toolcall_steps": 100},
    "no KL term": {
        f"{ACTOR}.use_kl_loss": False,
        f"{ACTOR}.kl_loss_coef": 0.0,
        f"{ACTOR}.kl_loss_type": "low_var_kl",
    },
    "clip higher": {f"{ACTOR}.clip_ratio_low": 0.2, f"{ACTOR}.clip_ratio_high": 0.28},
    "no normalisation": {"algorithm.norm_adv_by_std_in_grpo": False},
    "no length bias": {f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm"},
    "filters of samples": {
        "algorithm.filter_overlong_responses": True,
        "algorithm.filter_incomplete_responses": True,
        "algorithm.filter_repetitive_responses": True,
        "algorithm.filter_unreadable_responses": True,
    },
    "filter of groups": {f"{ROLLOUT}.rollout_filter_ratio": 0.75, f"{ROLLOUT}.rollout_filter_type": "std"},
}


def write(folder: Path, values: dict[str, Any]) -> Path:
    """A YAML file with these dotted keys as nested sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_pastes_in_and_changes_nothing_else(name: str, tmp_path: Path) -> None:
    block = BLOCKS[name]
    loaded, defaults = flatten(load(Config, write(tmp_path, block))), flatten(Config())
    assert {key: loaded[key] for key in block} == block
    assert {key for key in loaded if loaded[key] != defaults[key]} <= block.keys()


def test_all_blocks_together(tmp_path: Path) -> None:
    values = {key: value for block in BLOCKS.values() for key, value in block.items()}
    assert len(values) == sum(map(len, BLOCKS.values())) == 32
    loaded = flatten(load(Config, write(tmp_path, values)))
    assert {key: loaded[key] for key in values} == values


@pytest.mark.parametrize("name", ["loss_mode", "loss_mode_replay"])
@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("vanilla", "vanilla"), ("gpg", "gpg"), ("clip-cov", "clip_cov"), ("clip_cov", "clip_cov"),
        ("kl-cov", "kl_cov"), ("kl_cov", "kl_cov"),
    ],
)  # fmt: skip
def test_loss_modes_are_read_with_hyphens_and_underscores(name: str, text: str, mode: str) -> None:
    loss = load(Config, None, [f"{LOSS}.{name}={text}"]).actor_rollout_ref.actor.policy_loss
    assert loss.mode(replayed=name.endswith("replay")) == mode


@pytest.mark.parametrize("mode", ["none", "constant", "cosine"])
def test_tool_call_reward_modes(mode: str) -> None:
    assert load(Config, None, [f"algorithm.use_toolcall_reward={mode}"]).algorithm.use_toolcall_reward == mode


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="policy_loss.loss_mode.*clip-cov"):
        load(Config, None, [f"{LOSS}.loss_mode=clip cov"])
