"""Batch invariance: a request's tokens and log-probs are the same bits whatever runs beside it."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from engine_models import MODELS, make_engine, random_prompts, request, run, tiny_model

from spear_megatron.kernels.extension import compiled_module
from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.embedded import EmbeddedEngine
from spear_megatron.rollout.engine import GenerateRequest, GenerateResult


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, ModelShape]:
    return tiny_model(request.param)


def requests_of(shape: ModelShape, count: int) -> list[GenerateRequest]:
    prompts = random_prompts(count, shape.vocab_size, seed=11)
    return [
        request(ids, key=1000 + i, max_new_tokens=6 + i % 9, temperature=(1.0, 0.7, 0.0)[i % 3], name=str(i))
        for i, ids in enumerate(prompts)
    ]


def run_staggered(engine: EmbeddedEngine, requests: list[GenerateRequest], rng: random.Random) -> dict[str, Any]:
    """Submit in random order with random pauses, so that requests join in the middle of others."""
    results: dict[str, GenerateResult] = {}

    async def one(item: GenerateRequest, pauses: int) -> None:
        for _ in range(pauses):
            await asyncio.sleep(0)
        results[item.request_id] = await engine.generate(item)

    async def everything() -> None:
        shuffled = rng.sample(requests, len(requests))
        await asyncio.wait_for(asyncio.gather(*(one(item, rng.randrange(30)) for item in shuffled)), 120)

    asyncio.run(everything())
    return results


def test_alone_among_7_among_64(pair: tuple[Any, ModelShape]) -> None:
    model, shape = pair
    requests = requests_of(shape, 64)
    rng = random.Random(0)
    alone = {item.request_id: run(make_engine(model, shape, max_num_seqs=1), [item])[0] for item in requests[:10]}
    everyone = run_staggered(make_engine(model, shape), requests, rng)
    assert {key: everyone[key] for key in alone} == alone
    for _ in range(3):
        seven = run_staggered(make_engine(model, shape), rng.sample(requests, 7), rng)
        assert seven == {key: everyone[key] for key in seven}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_threads": 2},
        {"prefix_cache": False},
        {"max_num_seqs": 3},
        {"max_num_seqs": 5, "max_step_tokens": 6},
        {"max_num_seqs": 16, "max_step_tokens": 17, "num_cache_tokens": 128},
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
def test_engine_settings_do_not_change_a_bit(pair: tuple[Any, ModelShape], settings: dict[str, Any]) -> None:
    model, shape = pair
    requests = requests_of(shape, 24)
    assert run(make_engine(model, shape, **settings), requests) == run(make_engine(model, shape), requests)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_group_that_shares_a_prompt(pair: tuple[Any, ModelShape], prefix_cache: bool) -> None:
    model, shape = pair
    prompt = random_prompts(1, shape.vocab_size, seed=5, shortest=60)[0]
    group = [request(prompt, key=i, name=str(i)) for i in range(8)]
    engine = make_engine(model, shape, prefix_cache=prefix_cache)
    assert run(engine, group) == [run(make_engine(model, shape, max_num_seqs=1), [item])[0] for item in group]
    whole_pages = len(prompt) // 16 * 16
    assert engine.stats.num_cached_tokens == (7 * whole_pages if prefix_cache else 0)
    assert len({result.output_ids for result in run(engine, group)}) > 1


def test_next_turn_reuses_the_cache_and_equals_a_cold_engine(pair: tuple[Any, ModelShape]) -> None:
    model, shape = pair
    prompt = random_prompts(1, shape.vocab_size, seed=6, shortest=30, longest=30)[0]
    engine = make_engine(model, shape)
    first = run(engine, [request(prompt, key=3, max_new_tokens=25)])[0]
    turn = request([*prompt, *first.output_ids, 1, 2, 3], key=3)
    second = run(engine, [turn])[0]
    assert engine.stats.num_cached_tokens == (len(prompt) + 25 - 1) // 16 * 16
    assert second == run(make_engine(model, shape, prefix_cache=False), [turn])[0]


def test_prefix_is_forgotten_when_the_cache_is_full_but_results_stay(pair: tuple[Any, ModelShape]) -> None:
    model, shape = pair
    prompts = random_prompts(12, shape.vocab_size, seed=7, shortest=50)
    requests = [request(ids, key=i, name=str(i)) for i, ids in enumerate(prompts)]
    small = make_engine(model, shape, max_num_seqs=2, num_cache_tokens=128)
    expected = run(make_engine(model, shape, prefix_cache=False), requests)
    assert run(small, requests) == expected
    assert run(small, requests) == expected


def test_instruction_sets_with_fused_multiply_add_agree() -> None:
    if compiled_module().isa() != "avx512":
        pytest.skip("needs a processor with AVX-512 to compare it with AVX2")
    model, shape = tiny_model("qwen3-untied")
    requests = requests_of(shape, 12)
    wide, narrow, generic = (run(make_engine(model, shape, isa=isa), requests) for isa in ("avx512", "avx2", "generic"))
    assert wide == narrow
    first = [result.log_probs[0] for result in generic]  # later ones may follow another token
    assert first == pytest.approx([result.log_probs[0] for result in wide], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [16, 100, 384])
def test_wide_shapes_and_long_prompts(hidden: int) -> None:
    """Depths beyond one block of a dot product, prompts beyond one step, odd widths."""
    import dataclasses

    import torch

    _, base = tiny_model("qwen3-tied")
    shape = dataclasses.replace(base, hidden_size=hidden, intermediate_size=1300, head_dim=64, vocab_size=1001)
    generator = torch.Generator().manual_seed(hidden)
    weights = [(name, torch.randn(size, generator=generator) * 0.1) for name, size in shape.parameter_shapes().items()]
    prompts = random_prompts(9, shape.vocab_size, seed=8, shortest=300, longest=800)
    requests = [request(ids, key=i, name=str(i)) for i, ids in enumerate(prompts)]

    def results(**settings: Any) -> list[GenerateResult]:
        engine = EmbeddedEngine(shape, max_model_len=1024, **settings)
        engine.update_weights(weights, version=0)
        return run(engine, requests)

    expected = results(max_num_seqs=1, num_threads=1)
    assert results(max_num_seqs=9, num_threads=2) == expected
    assert results(max_num_seqs=4, num_threads=1, max_step_tokens=77, prefix_cache=False) == expected
