"""Observers of ``actor_rollout_ref.rollout.sglang.*``: the engine it makes, on a server that fails on purpose."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from observers.core import Observer, Observers

from spear_megatron.config.schema import Config

_SGLANG = "actor_rollout_ref.rollout.sglang"
_ONE = "http://127.0.0.1:9"
_GIVEN = ("actor_rollout_ref.rollout.name=sglang", f"{_SGLANG}.servers=[{_ONE}]", f"{_SGLANG}.health_interval_s=0.05")
_HASTE = (f"{_SGLANG}.request_timeout_s=0.2", f"{_SGLANG}.min_tokens_per_s=1000")


def shape_of(vocab_size: int = 320) -> Any:
    """A tiny model, as large as its embedding."""
    from spear_megatron.model.shape import ModelShape

    return ModelShape(
        architecture="qwen3", hidden_size=64, num_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=8, vocab_size=vocab_size, tie_word_embeddings=True, qkv_bias=False, qk_norm=True,
        rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=512,
    )  # fmt: skip


def request(new: int = 4) -> Any:
    """A request for so many tokens."""
    from spear_megatron.rollout.engine import GenerateRequest, SamplingParams

    return GenerateRequest("1-0-0/0/0", (5, 6, 7), SamplingParams(new), 0)


def targets(config: Config, scratch: Path) -> Any:
    """Where requests go, and how many at a time."""
    from spear_megatron.cli.agents import max_episodes, open_engine

    engine: Any = open_engine(config, shape_of(), 0, 2)
    limits = [client.max_in_flight for client in engine._pool.clients]
    return sorted(engine.stats.by_server), limits, max_episodes(config.actor_rollout_ref.rollout, 2)


def with_server(
    body: Callable[[Any, Any], Awaitable[Any]], *, vocab_size: int = 320, **fake: Any
) -> Callable[[Config, Path], Any]:
    """Observation of ``body(engine, server)`` with the engine of the configuration at a fake server."""

    def observe(config: Config, scratch: Path) -> Any:
        from spear_megatron.cli.agents import open_engine
        from spear_megatron.testing.fake_sglang import FakeSGLang

        async def run() -> Any:
            async with FakeSGLang(vocab_size=vocab_size, **fake) as server:
                ref = config.actor_rollout_ref
                settings = dataclasses.replace(ref.rollout.sglang, servers=(server.url,))
                rollout = dataclasses.replace(ref.rollout, sglang=settings)
                changed = dataclasses.replace(config, actor_rollout_ref=dataclasses.replace(ref, rollout=rollout))
                engine: Any = open_engine(changed, shape_of(vocab_size), 0, 1)
                try:
                    return await body(engine, server)
                finally:
                    await engine.close()

        return asyncio.run(run())

    return observe


async def outcome(engine: Any, server: Any) -> Any:
    """How a request ends: its number of tokens, or "lost" and the number of attempts."""
    from spear_megatron.rollout.engine import EngineError

    try:
        return len((await engine.generate(request())).output_ids)
    except EngineError:
        return "lost", len(server.received)


async def checks_until_down(engine: Any, server: Any) -> Any:
    """Health checks that fail before a server is given up."""
    await engine.generate(request())
    server.healthy, before = False, server.num_health_checks
    while not engine.stats.take_metrics()["engine/servers_down"]:
        await asyncio.sleep(0.001)
    return server.num_health_checks - before


async def checks_in_a_second(engine: Any, server: Any) -> Any:
    """Whether health checks come often."""
    await engine.generate(request())
    end, before = time.monotonic() + 1.0, server.num_health_checks
    while time.monotonic() < end and server.num_health_checks < before + 3:
        await asyncio.sleep(0.01)
    return server.num_health_checks >= before + 3


async def slow_check(engine: Any, server: Any) -> Any:
    """Whether a server whose checks take 0.5 s counts as down."""
    await engine.generate(request())
    server.health_delay_s = 0.5
    await asyncio.sleep(1.5)
    return bool(engine.stats.take_metrics()["engine/servers_down"])


async def buckets(engine: Any, server: Any) -> Any:
    """Requests that carry the weights: an embedding of 1 MiB and some more."""
    named = [(name, torch.zeros(shape)) for name, shape in shape_of(4096).parameter_shapes().items()]
    await asyncio.to_thread(engine.update_weights, named, 1)
    return len(server.updates)


async def slow_facts(engine: Any, server: Any) -> Any:
    """How a first request ends at a server that takes 0.5 s to say what it is."""
    server.control_delay_s = 0.5
    return await outcome(engine, server)


OBSERVERS: Observers = {
    f"{_SGLANG}.servers": Observer(targets, (f"[{_ONE}]", f"[{_ONE},http://127.0.0.1:10]"), _GIVEN),
    f"{_SGLANG}.router": Observer(targets, ("null", "http://127.0.0.1:11"), _GIVEN),
    f"{_SGLANG}.max_in_flight": Observer(targets, ("null", "6"), _GIVEN),
    f"{_SGLANG}.request_timeout_s": Observer(
        with_server(outcome, seconds_per_token=0.2), ("0.2", "30"), (*_GIVEN, *_HASTE)
    ),
    f"{_SGLANG}.min_tokens_per_s": Observer(
        with_server(outcome, seconds_per_token=0.2), ("1000", "0.2"), (*_GIVEN, *_HASTE)
    ),
    f"{_SGLANG}.retries": Observer(with_server(outcome, faults=["error_500"] * 2), ("0", "2"), _GIVEN),
    f"{_SGLANG}.health_interval_s": Observer(with_server(checks_in_a_second), ("0.05", "30"), _GIVEN),
    f"{_SGLANG}.health_timeout_s": Observer(
        with_server(slow_check), ("30", "0.1"), (*_GIVEN, f"{_SGLANG}.health_failures=1")
    ),
    f"{_SGLANG}.health_failures": Observer(with_server(checks_until_down), ("1", "3"), _GIVEN),
    f"{_SGLANG}.control_timeout_s": Observer(with_server(slow_facts), ("30", "0.1"), _GIVEN),
    f"{_SGLANG}.max_bucket_mb": Observer(with_server(buckets, vocab_size=4096), ("1", "8"), _GIVEN),
}
