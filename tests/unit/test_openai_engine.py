"""The engine for OpenAI-compatible servers against one that fails on purpose."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted import tiny_renderer

from spear_megatron.rollout.engine import Engine, EngineError, GenerateRequest, SamplingParams
from spear_megatron.rollout.openai.engine import OpenAIEngine
from spear_megatron.rollout.openai.models import served_model
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.testing.fake_openai import FakeOpenAI

QUICK = SGLangConfig(request_timeout_s=15.0, min_tokens_per_s=1000.0, control_timeout_s=5.0, retries=1)
RENDERER = tiny_renderer()
END = RENDERER.turn_end_id
TEXT = "The answer is \\boxed{336^\\circ}."


def encode(text: str) -> list[int]:
    return list(RENDERER.tokenizer.encode(text, add_special_tokens=False))


def server_of(*faults: Any, **options: Any) -> FakeOpenAI:
    return FakeOpenAI(lambda prompt, seed: [*encode(TEXT), END], RENDERER.decode, faults=faults, **options)


@asynccontextmanager
async def engine_of(server: FakeOpenAI, **options: Any) -> AsyncIterator[OpenAIEngine]:
    settings: dict[str, Any] = dict(
        model="fake", settings=QUICK, vocab_size=len(RENDERER.tokenizer), encode=encode, decode=RENDERER.decode,
        max_in_flight=4, max_model_len=256,
    )  # fmt: skip
    engine = OpenAIEngine(f"{server.url}/v1/", **{**settings, **options})
    try:
        yield engine
    finally:
        await engine.close()


def ask(new: int = 64, key: int = 7, stops: tuple[int, ...] = (END,), name: str = "0-1-2/0/0") -> GenerateRequest:
    ids = tuple(RENDERER.prompt_ids([{"role": "user", "content": "q"}]))
    return GenerateRequest(name, ids, SamplingParams(new, temperature=0.7, top_p=0.6, stop_token_ids=stops), key)


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def test_tokens_are_the_servers_own_where_it_names_them() -> None:
    async def body() -> None:
        async with server_of() as server, engine_of(server) as engine:
            assert isinstance(engine, Engine)
            result = await engine.generate(ask())
            assert result.output_ids == (*encode(TEXT), END) and result.finish_reason == "stop"
            assert len(result.log_probs) == len(result.output_ids) and all(map(math.isnan, result.log_probs))
            short = await engine.generate(ask(new=3))
            assert short.output_ids == tuple(encode(TEXT)[:3]) and short.finish_reason == "length"
            sent = server.received[0]
            assert sent["prompt"] == list(ask().input_ids) and sent["stop_token_ids"] == [END]
            assert (sent["temperature"], sent["top_p"], sent["max_tokens"]) == (0.7, 0.6, 64)
            assert engine.stats.num_tokenised_again == 0

    run(body)


def test_a_server_that_knows_only_openais_keys_is_asked_plainly_from_then_on() -> None:
    async def body() -> None:
        async with server_of(extended=False) as server, engine_of(server) as engine:
            for _ in range(2):
                result = await engine.generate(ask())
                assert result.output_ids == (*encode(TEXT), END) and result.finish_reason == "stop"
            assert [("return_token_ids" in body, body.get("stop")) for body in server.received] == [
                (True, None), (False, ["<|im_end|>"]), (False, ["<|im_end|>"]),
            ]  # fmt: skip
            assert engine.stats.num_tokenised_again == 2

    run(body)


def test_every_turn_of_every_sample_has_a_seed_of_its_own_that_repeats() -> None:
    async def body() -> None:
        async with server_of() as server, engine_of(server) as engine:
            longer = GenerateRequest("x", (*ask().input_ids, 5), ask().sampling, 7)
            for request in (ask(key=7), ask(key=8), longer, ask(key=7)):
                await engine.generate(request)
            seeds = [body["seed"] for body in server.received]
            assert len(set(seeds)) == 3 and seeds[0] == seeds[3] and all(0 <= seed < 2**31 for seed in seeds)

    run(body)


@pytest.mark.parametrize("fault", ["error_500", "rate_limited", "drop"])
def test_what_passes_is_asked_again_and_what_stays_is_an_engine_error(fault: Any) -> None:
    async def body() -> None:
        async with server_of(fault, fault, fault) as server, engine_of(server) as engine:
            with pytest.raises(EngineError, match="2 attempts were lost"):
                await engine.generate(ask())
            assert (await engine.generate(ask())).finish_reason == "stop"
            assert engine.stats.num_retries == 2

    run(body)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("hang", "did not finish within"), ("filtered", "content_filter"), ("no_choice", "one choice"),
        ("other_prompt", "does not take token ids"),
    ],
)  # fmt: skip
def test_an_answer_of_no_use_is_an_engine_error(fault: Any, message: str) -> None:
    async def body() -> None:
        settings = dataclasses.replace(QUICK, request_timeout_s=0.3 if fault == "hang" else 15.0)
        async with server_of(fault) as server, engine_of(server, settings=settings) as engine:
            with pytest.raises(EngineError, match=message):
                await engine.generate(ask())

    run(body)


def test_the_key_is_sent_and_its_absence_named(tmp_path: Path) -> None:
    async def body() -> None:
        async with server_of(api_key="secret") as server:
            async with engine_of(server, api_key="secret") as engine:
                await engine.generate(ask())
            async with engine_of(server, api_key_name="the environment variable K") as engine:
                with pytest.raises(ValueError, match="environment variable K"):
                    await engine.generate(ask())
            async with engine_of(server, api_key="secret", model="other") as engine:
                with pytest.raises(ValueError, match="--served-model"):
                    await engine.generate(ask())
            with pytest.raises(ValueError, match="--api-key-env"):
                await asyncio.to_thread(serving, server, None, tmp_path)

    run(body)


def serving(server: FakeOpenAI, wanted: str | None, folder: Path, key: str | None = None) -> str:
    return served_model(server.url, folder, wanted, api_key=key, max_model_len=100, timeout_s=5.0)


def test_the_served_model_is_found_or_refused(tmp_path: Path) -> None:
    async def body() -> None:
        async with server_of(max_model_len=100) as server:
            assert await asyncio.to_thread(serving, server, None, tmp_path) == "fake"
            with pytest.raises(ValueError, match="is not served by .* which has fake"):
                await asyncio.to_thread(serving, server, "other", tmp_path)
        async with server_of(max_model_len=99) as server:
            with pytest.raises(ValueError, match="99 tokens there and 100 here"):
                await asyncio.to_thread(serving, server, None, tmp_path)
        other = tmp_path / "other"
        for folder, text in ((tmp_path, "{}"), (other, '{"a": 1}')):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(text)
        async with server_of(model=str(other)) as server:
            with pytest.raises(ValueError, match="another model than"):
                await asyncio.to_thread(serving, server, None, tmp_path)

    run(body)


def test_requests_are_bounded_and_weights_and_closed_engines_refused() -> None:
    async def body() -> None:
        async with server_of() as server, engine_of(server, max_in_flight=2) as engine:
            await asyncio.gather(*(engine.generate(ask(name=f"r{i}")) for i in range(6)))
            assert server.peak == 2
            with pytest.raises(EngineError, match="weights cannot be sent"):
                engine.update_weights([], 1)
            with pytest.raises(ValueError, match="max_model_len"):
                await engine.generate(ask(new=4000))
            await engine.close()
            with pytest.raises(EngineError, match="closed"):
                await engine.generate(ask())

    run(body)
