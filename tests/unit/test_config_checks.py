"""Cross-field checks: what can run passes, what cannot is refused by key with a remedy."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from spear_megatron.config.checks import (
    check_batch,
    check_config,
    check_denominator,
    check_group_filters,
    check_group_size,
    check_kl,
    check_lengths,
    check_off_policy,
    check_old_log_prob,
    check_async,
    check_mismatch_async,
    check_context,
    check_token_budget,
    check_train_sampling,
    check_validation,
    check_warmup,
    check_world_size,
)
from spear_megatron.config.checks_replay import config_warnings, most_advantage, most_stored
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.model.shape import ModelShape

HF_CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
SHAPE = ModelShape.from_hf_config(HF_CONFIG)
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
GOOD = [
    lambda: check_world_size(8, 2, 2),
    lambda: check_world_size(1, 1, 1),
    lambda: check_async(1, False),
    lambda: check_async(0, True),
    lambda: check_mismatch_async(0, 0.1, 0.2),
    lambda: check_mismatch_async(1, None, None),
    lambda: check_context(2, "mini_batch", "clip-cov"),
    lambda: check_context(2, "micro_batch", "vanilla"),
    lambda: check_batch(8, 8),
    lambda: check_batch(8, 2),
    lambda: check_lengths(10, 20, None, 30),
    lambda: check_lengths(10, 20, 30, 30),
    lambda: check_token_budget(30, 30),
    lambda: check_token_budget(32, 30, 4),
    lambda: check_kl("use_kl_loss", False, 0.0),
    lambda: check_kl("use_kl_in_reward", True, 1e-3),
    lambda: check_group_size("grpo", 2),
    lambda: check_group_size("reinforce_plus_plus", 1),
    lambda: check_group_filters(False, 0.75, 2),
    lambda: check_group_filters(True, 1.0, 2),
    lambda: check_group_filters(False, 1.0, 1),
    lambda: check_old_log_prob("rollout", "none", False),
    lambda: check_old_log_prob("trainer", "tis", True),
    lambda: check_denominator("micro_batch_share", "seq-mean-token-sum-norm"),
    lambda: check_denominator("rows", "token-mean"),
    lambda: check_train_sampling(1.0, -1),
    lambda: check_validation(True, False, False),
    lambda: check_validation(False, True, False),
    lambda: check_warmup(9, 10),
]
BAD: list[tuple[Callable[[], None], list[str]]] = [
    (lambda: check_world_size(6, 2, 2), ["6 ranks", "tensor_model_parallel_size=2", "multiple of 4"]),
    (lambda: check_world_size(1, 2, 1), ["1 ranks", "multiple of 2"]),
    (lambda: check_world_size(2, 2, 1, 2), ["context_parallel_size=2", "multiple of 4"]),
    (lambda: check_async(1, True), ["trainer.async=1", "colocated=true"]),
    (lambda: check_mismatch_async(1, 0.1, None), ["rollout.mismatch.mask=0.1", "trainer.async=1", "mask=null"]),
    (lambda: check_mismatch_async(1, None, 0.2), ["rollout.mismatch.stop=0.2", "trainer.async=1", "stop=null"]),
    (lambda: check_context(2, "micro_batch", "clip-cov"), ["cov_scope=micro_batch", "context_parallel_size=2"]),
    (lambda: check_batch(8, 16), ["ppo_mini_batch_size=16", "at most 8"]),
    (lambda: check_batch(8, 3), ["data.train_batch_size=8", "ppo_mini_batch_size=3"]),
    (lambda: check_lengths(10, 20, 29, 100), ["= 30 exceeds", "rollout.max_model_len=29"]),
    (lambda: check_lengths(10, 20, None, 29), ["= 30 exceeds", "max_position_embeddings=29"]),
    (lambda: check_lengths(10, 20, 64, 40), ["max_model_len=64", "at most 40"]),
    (lambda: check_token_budget(29, 30), ["ppo_max_token_len_per_gpu=29", "at least 30"]),
    (lambda: check_token_budget(31, 30, 4), ["at least 32"]),
    (lambda: check_kl("use_kl_loss", True, 0.0), ["actor.use_kl_loss=true", "kl_loss_coef"]),
    (lambda: check_kl("use_kl_in_reward", True, 0.0), ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef"]),
    (lambda: check_group_size("grpo", 1), ["rollout.n=1", "adv_estimator=grpo", "at least 2"]),
    (lambda: check_group_size("rloo", 1), ["adv_estimator=rloo"]),
    (lambda: check_group_size("gigpo", 1), ["adv_estimator=gigpo"]),
    (lambda: check_group_filters(True, 0.75, 4), ["filter_groups.enable=true", "rollout_filter_ratio=0.75", "1.0"]),
    (lambda: check_group_filters(True, 1.0, 1), ["filter_groups.enable=true", "rollout.n=1"]),
    (lambda: check_group_filters(False, 0.5, 1), ["rollout_filter_ratio=0.5", "rollout.n=1"]),
    (lambda: check_old_log_prob("rollout", "tis", False), ["mode=tis", "old_log_prob=rollout", "=trainer"]),
    (lambda: check_old_log_prob("rollout", "none", True), ["use_kl_in_reward=true", "old_log_prob=rollout", "use_kl"]),
    (lambda: check_denominator("micro_batch_share", "token-mean"), ["micro_batch_share", "token-mean", "=rows"]),
    (lambda: check_train_sampling(0.9, -1), ["rollout.top_p=0.9", "set it to 1.0"]),
    (lambda: check_train_sampling(1.0, 5), ["rollout.top_k=5", "set it to -1"]),
    (lambda: check_validation(True, True, False), ["data.val_files", "trainer.test_freq=-1"]),
    (lambda: check_warmup(10, 10), ["lr_warmup_steps=10", "trainer.total_training_steps"]),
]


@pytest.mark.parametrize("check", GOOD)
def test_accepted(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("check", "parts"), BAD)
def test_refused_in_one_sentence(check: Callable[[], None], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        check()
    text = str(caught.value)
    assert all(part in text for part in parts) and "\n" not in text, text


@pytest.mark.parametrize(
    ("overrides", "world_size", "part"),
    [
        ([], 3, None),
        (["actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2"], 3, "3 ranks"),
        (["actor_rollout_ref.actor.megatron.tensor_model_parallel_size=3"], 3, "tensor_model_parallel_size"),
        (["actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=3"], 3, "pipeline_model_parallel_size=3"),
        (["data.train_batch_size=60"], 1, "ppo_mini_batch_size"),
        (["data.max_response_length=4000"], 1, "max_position_embeddings"),
        (["actor_rollout_ref.rollout.max_model_len=100"], 1, "max_model_len"),
        (["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1000"], 1, "ppo_max_token_len_per_gpu"),
        (["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0"], 1, "kl_ctrl.kl_coef"),
        (["actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_coef=0"], 1, "kl_loss_coef"),
        (["actor_rollout_ref.rollout.n=1"], 1, "rollout.n=1"),
        (["data.train_files=[x.jsonl]"], 1, "data.val_files"),
        (["actor_rollout_ref.actor.optim.lr_warmup_steps=5000"], 1, "lr_warmup_steps"),
        (["algorithm.adv_estimator=rloo", "actor_rollout_ref.rollout.n=1"], 1, "adv_estimator=rloo"),
        (["algorithm.filter_groups.enable=true", f"{ROLLOUT}.rollout_filter_ratio=0.5"], 1, "filter_groups.enable"),
        (["algorithm.rollout_correction.mode=tis", f"{ACTOR}.old_log_prob=rollout"], 1, "old_log_prob=rollout"),
        (["algorithm.use_kl_in_reward=true", f"{ACTOR}.old_log_prob=rollout"], 1, "old_log_prob=rollout"),
        ([f"{ACTOR}.sum_norm_denominator=micro_batch_share"], 1, "sum_norm_denominator"),
        ([f"{ACTOR}.policy_loss.cov_scope=micro_batch", f"{ACTOR}.policy_loss.clip_cov_bounds=quantile"], 1, None),
        ([f"{ACTOR}.enable_trajectory_replay=true"], 1, None),
        ([f"{ACTOR}.enable_trajectory_replay=true", f"{ACTOR}.trajectory_tolerate_steps=0"], 1, "trajectory_tolerate"),
        ([f"{ACTOR}.enable_trajectory_replay=true", f"{ACTOR}.trajectory_buffer_size=6000"], 1, "trigger_ratio=1.0"),
        ([f"{ACTOR}.enable_trajectory_replay=true", f"{ACTOR}.replay.batch_size=9999"], 1, None),
    ],
)
def test_a_whole_configuration(overrides: list[str], world_size: int, part: str | None) -> None:
    config = load(Config, None, overrides)
    if part is None:
        check_config(config, SHAPE, world_size)
        return
    with pytest.raises(ValueError, match=part.replace(".", r"\.")):
        check_config(config, SHAPE, world_size)


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ([], 10 * 64 * 8),
        ([f"{ACTOR}.replay.capacity_ratio=1.0", f"{ACTOR}.trajectory_buffer_size=100"], 100),
        ([f"{ACTOR}.trajectory_tolerate_steps=3", f"{ROLLOUT}.rollout_filter_ratio=0.7"], 3 * 44 * 8),
        ([f"{ACTOR}.replay.staleness=released"], 12 * 64 * 8),
        ([f"{ACTOR}.replay.staleness=released", f"{ACTOR}.trajectory_tolerate_steps=50"], 12 * 64 * 8),
        ([f"{ACTOR}.replay.staleness=released", f"{ACTOR}.trajectory_tolerate_steps=0"], 2 * 64 * 8),
    ],
)
def test_what_the_buffer_can_hold(overrides: list[str], most: int) -> None:
    unbounded = [f"{ACTOR}.replay.capacity_ratio=0", f"{ACTOR}.replay.trigger_ratio=1.0"]
    assert most_stored(load(Config, None, [*unbounded, *overrides])) == most


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.norm_adv_by_std_in_grpo=true"],
        ["algorithm.norm_adv_by_std_in_grpo=false"],
        ["algorithm.norm_adv_by_std_in_grpo=false", "reward.kwargs={correct: 2, wrong: -1}"],
        ["algorithm.norm_adv_by_std_in_grpo=false", "algorithm.use_toolcall_reward=cosine"],
        ["algorithm.adv_estimator=rloo", "algorithm.format_reward=0.5"],
    ],
)
def test_no_advantage_exceeds_the_bound_and_one_reaches_it(overrides: list[str]) -> None:
    config = load(Config, None, [*overrides, f"{ROLLOUT}.n=5"])
    algorithm, kwargs = config.algorithm, config.reward.kwargs
    bonus = algorithm.format_reward + (algorithm.use_toolcall_reward != "none")
    values = (kwargs.get("wrong", 0.0), kwargs.get("correct", 1.0) + bonus)
    seen = []
    for num_good in range(1, 5):
        rewards = [values[1]] * num_good + [values[0]] * (5 - num_good)
        if algorithm.adv_estimator == "rloo":
            seen.append(rewards[0] - statistics.mean(rewards[1:]))
        else:
            scale = statistics.stdev(rewards) if algorithm.norm_adv_by_std_in_grpo else 1.0
            seen.append((rewards[0] - statistics.mean(rewards)) / scale)
    assert max(seen) == pytest.approx(most_advantage(config))


def test_what_is_not_known_about_rewards_gives_no_warning() -> None:
    on, high = f"{ACTOR}.enable_trajectory_replay=true", f"{ACTOR}.trajectory_score_threshold=100"
    penalty = f"{ACTOR}.use_invalid_action_penalty=true"
    for unknown in ("reward.name=my:Reward", "algorithm.adv_estimator=gigpo", penalty):
        assert config_warnings(load(Config, None, [on, high, unknown])) == []


def test_a_threshold_that_nothing_passes_is_a_warning() -> None:
    plain = ["algorithm.norm_adv_by_std_in_grpo=false", f"{ACTOR}.trajectory_score_threshold=0.875"]
    assert config_warnings(load(Config, None, plain)) == []
    (text,) = config_warnings(load(Config, None, [*plain, f"{ACTOR}.enable_trajectory_replay=true"]))
    assert "trajectory_score_threshold=0.875" in text and "at most 0.875" in text and "\n" not in text
    assert config_warnings(load(Config, None, [plain[0], f"{ACTOR}.enable_trajectory_replay=true"])) == []


def test_replay_without_weight_is_a_warning() -> None:
    overrides = [f"{ACTOR}.enable_trajectory_replay=true", f"{ACTOR}.replay_loss_coef=0"]
    (text,) = config_warnings(load(Config, None, overrides))
    assert "replay_loss_coef=0" in text


@pytest.mark.parametrize("mode", ["tis", "icepop", "sequence_mask"])
def test_trajectories_of_older_weights_need_a_correction(mode: str) -> None:
    check_off_policy("trainer.async=1", mode, "trainer", "vanilla")
    check_off_policy("trainer.async=1", mode, "trainer", "gpg")
    check_off_policy("trainer.async=1", "none", "rollout", "vanilla")
    with pytest.raises(ValueError, match="trainer.async=1 trains on .*rollout_correction.mode .*old_log_prob=rollout"):
        check_off_policy("trainer.async=1", "none", "trainer", "vanilla")
    with pytest.raises(ValueError, match="sequence_mask$"):
        check_off_policy("trainer.async=1", "none", "rollout", "gpg")
    given = ["trainer.async=1", "data.train_batch_size=64"]
    with pytest.raises(ValueError, match="trainer.async=1"):
        check_config(load(Config, None, given), SHAPE, 1)
    given.append(f"algorithm.rollout_correction.mode={mode}")
    check_config(load(Config, None, given), SHAPE, 1)
    with pytest.raises(ValueError, match="mismatch.stop=0.5 .*trainer.async=1"):
        check_config(load(Config, None, [*given, f"{ROLLOUT}.mismatch.stop=0.5"]), SHAPE, 1)
