"""Cross-field checks: what can run passes, what cannot is refused by key with a remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spear_megatron.config.checks import (
    check_batch,
    check_config,
    check_group_size,
    check_kl,
    check_lengths,
    check_token_budget,
    check_train_sampling,
    check_validation,
    check_warmup,
    check_world_size,
)
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.model.shape import ModelShape

SHAPE = ModelShape.from_hf_config(
    {
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
)
GOOD = [
    lambda: check_world_size(8, 2, 2),
    lambda: check_world_size(1, 1, 1),
    lambda: check_batch(8, 8),
    lambda: check_batch(8, 2),
    lambda: check_lengths(10, 20, None, 30),
    lambda: check_lengths(10, 20, 30, 30),
    lambda: check_token_budget(30, 30),
    lambda: check_token_budget(32, 30, 4),
    lambda: check_kl("use_kl_loss", False, 0.0),
    lambda: check_kl("use_kl_in_reward", True, 1e-3),
    lambda: check_group_size("grpo", 2),
    lambda: check_train_sampling(1.0, -1),
    lambda: check_validation(True, False, False),
    lambda: check_validation(False, True, False),
    lambda: check_warmup(9, 10),
]
BAD: list[tuple[Callable[[], None], list[str]]] = [
    (lambda: check_world_size(6, 2, 2), ["6 ranks", "tensor_model_parallel_size=2", "multiple of 4"]),
    (lambda: check_world_size(1, 2, 1), ["1 ranks", "multiple of 2"]),
    (lambda: check_batch(8, 16), ["ppo_mini_batch_size=16", "at most 8"]),
    (lambda: check_batch(8, 3), ["data.train_batch_size=8", "ppo_mini_batch_size=3"]),
    (lambda: check_lengths(10, 20, 29, 100), ["= 30 exceeds", "rollout.max_model_len=29"]),
    (lambda: check_lengths(10, 20, None, 29), ["= 30 exceeds", "max_position_embeddings=29"]),
    (lambda: check_lengths(10, 20, 64, 40), ["max_model_len=64", "at most 40"]),
    (lambda: check_token_budget(29, 30), ["ppo_max_token_len_per_gpu=29", "at least 30"]),
    (lambda: check_token_budget(31, 30, 4), ["at least 32"]),
    (lambda: check_kl("use_kl_loss", True, 0.0), ["actor.use_kl_loss=true", "kl_loss_coef"]),
    (lambda: check_kl("use_kl_in_reward", True, 0.0), ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef"]),
    (lambda: check_group_size("grpo", 1), ["rollout.n=1", "at least 2"]),
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
    ],
)
def test_a_whole_configuration(overrides: list[str], world_size: int, part: str | None) -> None:
    config = load(Config, None, overrides)
    if part is None:
        check_config(config, SHAPE, world_size)
        return
    with pytest.raises(ValueError, match=part.replace(".", r"\.")):
        check_config(config, SHAPE, world_size)
