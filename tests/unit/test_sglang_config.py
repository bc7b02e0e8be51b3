"""Settings of SGLang generation: what is refused by name, and what a leader makes of them."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from spear_megatron.cli.agents import max_episodes, open_engine
from spear_megatron.cli.build import fingerprint
from spear_megatron.config.checks import check_in_flight
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.config import RolloutConfig
from spear_megatron.rollout.embedded import EmbeddedEngine
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.engine import SGLangEngine
from spear_megatron.rollout.sglang.stats import server_name

KEY = "actor_rollout_ref.rollout"
ONE, TWO = "http://10.0.0.7:30000", "http://10.0.0.8:30000"
SHAPE = ModelShape(
    architecture="qwen3", hidden_size=16, num_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=24, vocab_size=320, tie_word_embeddings=True, qkv_bias=False, qk_norm=True, rms_norm_eps=1e-6,
    rope_theta=1e4, max_position_embeddings=4096,
)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"servers": ("10.0.0.7:30000",)}, r"sglang\.servers: '10.0.0.7:30000' is no URL of a server"),
        ({"servers": ("http://10.0.0.7:30000/generate",)}, r"sglang\.servers"),
        ({"servers": (ONE, TWO, ONE)}, f"names {ONE} more than once"),
        ({"router": "ftp://a"}, r"sglang\.router"),
        ({"max_in_flight": 0}, r"sglang\.max_in_flight"),
        ({"request_timeout_s": 0.0}, r"sglang\.request_timeout_s"),
        ({"min_tokens_per_s": float("inf")}, r"sglang\.min_tokens_per_s"),
        ({"retries": -1}, r"sglang\.retries"),
        ({"health_interval_s": -1.0}, r"sglang\.health_interval_s"),
        ({"health_timeout_s": float("nan")}, r"sglang\.health_timeout_s"),
        ({"health_failures": 0}, r"sglang\.health_failures"),
        ({"control_timeout_s": 0.0}, r"sglang\.control_timeout_s"),
        ({"max_bucket_mb": 0}, r"sglang\.max_bucket_mb"),
    ],
)
def test_errors_name_the_key(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SGLangConfig(**values)


def test_engine_and_servers_go_together() -> None:
    assert RolloutConfig(name="sglang").sglang.servers == ()  # the run starts its own
    with pytest.raises(ValueError, match=r"sglang\.servers is set, but .*name=embedded asks no server"):
        RolloutConfig(sglang=SGLangConfig(servers=(ONE,)))
    with pytest.raises(ValueError, match=r"sglang\.router is set, but"):
        RolloutConfig(sglang=SGLangConfig(router=ONE))
    with pytest.raises(ValueError, match=f"{KEY}.name must be one of 'embedded', 'sglang', got 'vllm'"):
        load(Config, None, [f"{KEY}.name=vllm"])


def test_every_leader_must_have_a_place_at_a_server() -> None:
    check_in_flight(None, 8, 8)
    check_in_flight(8, 2, 8)
    with pytest.raises(ValueError, match=r"rollout\.max_num_seqs=7 is shared by 8 .*leaders: raise it to 8"):
        check_in_flight(None, 7, 8)
    with pytest.raises(ValueError, match=r"rollout\.sglang\.max_in_flight=7"):
        check_in_flight(7, 64, 8)


def configured(*overrides: str) -> Config:
    config: Config = load(Config, None, [f"{KEY}.name=sglang", f"{KEY}.sglang.servers=[{ONE},{TWO}]", *overrides])
    return config


def test_leaders_share_the_places_and_one_sends_the_weights() -> None:
    config = configured(f"{KEY}.sglang.max_in_flight=100")
    engines: list[Any] = [open_engine(config, SHAPE, rank, 3) for rank in range(3)]
    assert all(isinstance(engine, SGLangEngine) for engine in engines)
    assert [engine._sends_weights for engine in engines] == [True, False, False]
    assert {client.max_in_flight for engine in engines for client in engine._pool.clients} == {33}
    assert max_episodes(config.actor_rollout_ref.rollout, 3) == 2 * 33 * 2
    assert len({engine._name for engine in engines}) == 3
    embedded = load(Config, None, [f"{KEY}.max_num_seqs=5", "data.max_response_length=16", "data.max_prompt_length=16"])
    assert max_episodes(embedded.actor_rollout_ref.rollout, 3) == 10
    assert isinstance(open_engine(embedded, SHAPE, 0, 3), EmbeddedEngine)
    for engine in engines:
        asyncio.run(engine.close())


def test_servers_do_not_decide_the_course_of_a_run() -> None:
    config = configured()
    other = configured(f"{KEY}.sglang.servers=[{ONE}]", f"{KEY}.sglang.retries=5")
    assert fingerprint(config) == fingerprint(other)
    assert fingerprint(config) != fingerprint(load(Config, None, []))


def test_deadlines_grow_with_tokens() -> None:
    settings = SGLangConfig(request_timeout_s=10.0, min_tokens_per_s=4.0)
    assert settings.deadline_s(100) == 35.0
    assert dataclasses.replace(settings, min_tokens_per_s=1.0).deadline_s(100) == 110.0


def test_servers_have_names_that_figures_may_have() -> None:
    assert server_name(ONE) == "10.0.0.7-30000" and server_name("https://node.local") == "node.local-443"
    assert server_name("http://[fe80::1]:30000") == "fe80..1-30000"
