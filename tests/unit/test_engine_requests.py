"""Requests and weights: errors before anything runs, stop tokens, cancelling, closing, waiting in turn."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
import torch
from engine_models import make_engine, named_weights, random_prompts, request, run, tiny_model

from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.embedded import EmbeddedEngine
from spear_megatron.rollout.engine import Engine, EngineError, GenerateRequest


@pytest.fixture(scope="module")
def pair() -> tuple[Any, ModelShape]:
    return tiny_model("qwen2-tied")


def changed(**sampling: Any) -> GenerateRequest:
    base = request((1, 2, 3), name="bad one")
    return dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, **sampling))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request((), name="bad one"), "no input_ids"),
        (request((1, 320), name="bad one"), r"input_ids\[1\] = 320 is outside the vocabulary of 320"),
        (request((1, -1), name="bad one"), r"input_ids\[1\] = -1"),
        (request((1, 2.0), name="bad one"), r"input_ids\[1\] = 2.0"),
        (request((1, None), name="bad one"), r"input_ids\[1\] = None"),
        (request((True,), name="bad one"), r"input_ids\[0\] = True"),
        (request((1,) * 121, name="bad one"), "121 input ids and max_new_tokens=8 exceed max_model_len=128"),
        (request((1,), key=-1, name="bad one"), "noise_key must be an integer of 64 bits"),
        (request((1,), key=1 << 64, name="bad one"), "noise_key"),
        (request((1,), stop=(4, 999), name="bad one"), r"stop_token_ids\[1\] = 999"),
        (changed(max_new_tokens=0), "max_new_tokens must be a positive integer"),
        (changed(max_new_tokens=1.5), "max_new_tokens"),
        (changed(temperature=-0.1), "temperature"),
        (changed(temperature=float("nan")), "temperature"),
        (changed(temperature=1e-30), "at least 0.001"),
        (changed(temperature=float("inf")), "temperature"),
        (changed(top_p=0.0), "top_p"),
        (changed(top_p=1.1), "top_p"),
        (changed(top_k=0), "top_k"),
        (changed(top_k=2.5), "top_k"),
    ],
)
def test_impossible_requests(pair: tuple[Any, ModelShape], bad: GenerateRequest, words: str) -> None:
    engine = make_engine(*pair)
    with pytest.raises(ValueError, match=words) as caught:
        run(engine, [bad])
    assert "'bad one'" in str(caught.value) and engine.stats.num_steps == 0


def test_stop_tokens_end_a_request_and_keep_their_log_prob(pair: tuple[Any, ModelShape]) -> None:
    engine = make_engine(*pair)
    free = run(engine, [request((7, 8), key=1, max_new_tokens=30)])[0]
    stop = free.output_ids[11]
    first = free.output_ids.index(stop)
    stopped = run(engine, [request((7, 8), key=1, max_new_tokens=30, stop=(stop, 0))])[0]
    if 0 in free.output_ids[:first]:
        first = free.output_ids.index(0)
    assert stopped.finish_reason == "stop" and free.finish_reason == "length"
    assert stopped.output_ids == free.output_ids[: first + 1]
    assert stopped.log_probs == free.log_probs[: first + 1]
    assert stopped.policy_versions == (1,) * (first + 1)


def test_a_request_may_fill_the_context(pair: tuple[Any, ModelShape]) -> None:
    engine = make_engine(*pair, max_num_seqs=2)
    results = run(engine, [request((1,) * 120, key=i) for i in range(5)])
    assert [len(result.output_ids) for result in results] == [8] * 5


def test_every_request_is_served_in_turn(pair: tuple[Any, ModelShape]) -> None:
    """40 requests through 3 slots and a cache for little more than one: short late ones never overtake the first."""
    model, shape = pair
    engine = make_engine(model, shape, max_num_seqs=3, max_step_tokens=8, num_cache_tokens=160)
    order: list[int] = []

    async def one(index: int, ids: tuple[int, ...]) -> None:
        await engine.generate(request(ids, key=index, max_new_tokens=1 + index % 5))
        order.append(index)

    async def everyone() -> None:
        prompts = random_prompts(40, shape.vocab_size, seed=3, longest=110)
        await asyncio.wait_for(asyncio.gather(*(one(i, ids) for i, ids in enumerate(prompts))), 60)

    asyncio.run(everyone())
    assert sorted(order) == list(range(40))
    assert all(abs(place - index) <= 3 for place, index in enumerate(order))


def test_engine_implements_the_protocol_and_survives_several_loops(pair: tuple[Any, ModelShape]) -> None:
    engine = make_engine(*pair)
    assert isinstance(engine, Engine)
    assert run(engine, [request((1, 2), key=4)]) == run(engine, [request((1, 2), key=4)])


def test_the_loop_goes_on_between_steps(pair: tuple[Any, ModelShape]) -> None:
    engine = make_engine(*pair)

    async def count_turns() -> int:
        task, turns = asyncio.create_task(engine.generate(request((1,), max_new_tokens=50))), 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert asyncio.run(count_turns()) >= 50


def test_cancelled_requests_leave_no_trace(pair: tuple[Any, ModelShape]) -> None:
    engine = make_engine(*pair, max_num_seqs=1)
    expected = run(make_engine(*pair), [request((9, 9), key=2)])[0]

    async def cancel_two() -> Any:
        running = asyncio.create_task(engine.generate(request((1,), max_new_tokens=100)))
        waiting = asyncio.create_task(engine.generate(request((2,), max_new_tokens=100)))
        last = asyncio.create_task(engine.generate(request((9, 9), key=2)))
        for _ in range(5):
            await asyncio.sleep(0)
        running.cancel()
        waiting.cancel()
        outcomes = await asyncio.wait_for(asyncio.gather(running, waiting, last, return_exceptions=True), 30)
        return outcomes

    running, waiting, last = asyncio.run(cancel_two())
    assert isinstance(running, asyncio.CancelledError) and isinstance(waiting, asyncio.CancelledError)
    assert last == expected
    assert engine.stats.num_sampled_tokens < 20


def test_closing_fails_pending_requests(pair: tuple[Any, ModelShape]) -> None:
    engine = make_engine(*pair, max_num_seqs=1)

    async def close_early() -> list[Any]:
        tasks = [
            asyncio.create_task(engine.generate(request((i + 1,), max_new_tokens=90, name=f"q{i}"))) for i in range(3)
        ]
        for _ in range(5):
            await asyncio.sleep(0)
        await engine.close()
        await engine.close()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    outcomes = asyncio.run(close_early())
    assert [type(outcome) for outcome in outcomes] == [EngineError] * 3
    assert "closed" in str(outcomes[2]) and "'q2'" in str(outcomes[2])
    with pytest.raises(EngineError, match="closed"):
        run(engine, [request((1,))])
    with pytest.raises(EngineError, match="closed"):
        engine.update_weights(named_weights(pair[0]), version=2)


def test_no_weights_no_tokens(pair: tuple[Any, ModelShape]) -> None:
    engine = EmbeddedEngine(pair[1], max_num_seqs=2, max_model_len=32)
    with pytest.raises(EngineError, match="no complete weights"):
        run(engine, [request((1,))])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda weights: weights[:-1], "1 of .* missing .*'model.norm.weight'"),
        (lambda weights: [*weights, ("lm_head.weight", weights[0][1])], "'lm_head.weight' does not belong"),
        (lambda weights: [*weights, weights[3]], "given twice"),
        (lambda weights: [(n, t[:-1] if "up_proj" in n else t) for n, t in weights], "up_proj.* has shape"),
        (lambda weights: [(n, t.int() if "norm" in n else t) for n, t in weights], "must be floating point"),
    ],
)
def test_bad_weight_updates(pair: tuple[Any, ModelShape], spoil: Any, words: str) -> None:
    engine = make_engine(*pair)
    with pytest.raises(ValueError, match=words):
        engine.update_weights(spoil(named_weights(pair[0])), version=2)
    assert engine.version is None
    with pytest.raises(EngineError, match="no complete weights"):
        run(engine, [request((1,))])
    engine.update_weights(named_weights(pair[0]), version=3)
    assert run(engine, [request((1,))])[0].policy_versions == (3,) * 8


def test_logits_that_are_not_finite_fail_the_request_only(pair: tuple[Any, ModelShape]) -> None:
    """A NaN in one row of the embedding spoils the request that reads it, not its neighbour."""
    model, shape = tiny_model("qwen2-untied")
    weights = [(name, tensor.clone()) for name, tensor in named_weights(model)]
    dict(weights)["model.embed_tokens.weight"][77] = float("nan")
    engine = EmbeddedEngine(shape, max_num_seqs=4, max_model_len=32, num_threads=1)
    engine.update_weights(weights, version=1)

    async def both() -> list[Any]:
        asks = [request((5, 77), name="spoiled"), request((5, 6), name="fine", stop=(77,))]
        return await asyncio.wait_for(asyncio.gather(*map(engine.generate, asks), return_exceptions=True), 30)

    spoiled, fine = asyncio.run(both())
    assert isinstance(spoiled, EngineError) and "'spoiled', position 2: logits that are not finite" in str(spoiled)
    assert len(fine.output_ids) >= 1


def test_weights_that_change_under_a_request(pair: tuple[Any, ModelShape]) -> None:
    """Tokens after the update equal those of a fresh engine with the new weights that continues the same ids."""
    model, shape = pair
    prompt = random_prompts(1, shape.vocab_size, seed=9, shortest=40)[0]
    doubled = [(name, tensor * 1.5) for name, tensor in named_weights(model)]
    engine = make_engine(model, shape)

    async def update_midway() -> Any:
        task = asyncio.create_task(engine.generate(request(prompt, key=6, max_new_tokens=20)))
        while engine.stats.num_sampled_tokens < 8:
            await asyncio.sleep(0)
        engine.update_weights(doubled, version=2)
        return await asyncio.wait_for(task, 30)

    result = asyncio.run(update_midway())
    num_old = result.policy_versions.count(1)
    assert result.policy_versions == (1,) * num_old + (2,) * (20 - num_old) and 8 <= num_old < 20
    old = run(make_engine(model, shape), [request(prompt, key=6, max_new_tokens=num_old)])[0]
    fresh = make_engine(model, shape)
    fresh.update_weights(doubled, version=2)
    rest = [*prompt, *old.output_ids]
    new = run(fresh, [request(rest, key=6, max_new_tokens=20 - num_old)])[0]
    assert result.output_ids == old.output_ids + new.output_ids
    assert result.log_probs == old.log_probs + new.log_probs


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_model_len": 1}, "max_model_len=1"),
        ({"max_step_tokens": 64}, "max_step_tokens=64 must exceed"),
        ({"num_cache_tokens": 64}, "num_cache_tokens=64"),
        ({"num_threads": 0}, "num_threads"),
        ({"isa": "sse9"}, "sse9"),
    ],
)
def test_impossible_engines(pair: tuple[Any, ModelShape], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_engine(*pair, **settings)


def test_weights_may_require_gradients(pair: tuple[Any, ModelShape]) -> None:
    model, shape = pair
    engine = make_engine(model, shape)
    expected = run(engine, [request((3, 4), key=1)])
    engine.update_weights([(n, torch.nn.Parameter(t)) for n, t in named_weights(model)], version=1)
    assert run(engine, [request((3, 4), key=1)]) == expected


def test_a_failed_step_leaves_nothing_in_the_prefix_cache(
    pair: tuple[Any, ModelShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages were registered before they were computed: asked again, the same prompt must not find them."""
    ask = request(random_prompts(1, pair[1].vocab_size, seed=5, shortest=48)[0], key=3)
    expected = run(make_engine(*pair), [ask])
    engine = make_engine(*pair)

    def fail(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine._decoder, "forward", fail)
        with pytest.raises(EngineError, match="out of memory"):
            run(engine, [ask])
    assert run(engine, [ask]) == expected


def test_an_aborted_request_frees_its_slot_and_goes_on_later_as_if_nothing_had_happened(
    pair: tuple[Any, ModelShape],
) -> None:
    async def play() -> tuple[Any, Any, Any]:
        engine = make_engine(*pair, max_num_seqs=1)
        whole = await engine.generate(request((1, 2, 3), name="whole", max_new_tokens=20))
        first = asyncio.create_task(engine.generate(request((1, 2, 3), name="first", max_new_tokens=20)))
        waiting = asyncio.create_task(engine.generate(request((4, 5), name="waiting", max_new_tokens=2)))
        while engine.stats.num_sampled_tokens < 27:
            await asyncio.sleep(0)
        await engine.abort(["first", "unknown"])
        part, other = await first, await waiting
        assert other.finish_reason == "length" and part.finish_reason == "abort" and len(part.output_ids) == 7
        rest = await engine.generate(request((1, 2, 3, *part.output_ids), name="rest", max_new_tokens=13))
        never = asyncio.create_task(engine.generate(request((1, 2, 3), name="never")))
        await asyncio.sleep(0)
        await engine.abort(["never"])
        assert (await never).output_ids == ()
        await engine.close()
        return whole, part, rest

    whole, part, rest = asyncio.run(play())
    assert part.output_ids + rest.output_ids == whole.output_ids
    assert part.log_probs + rest.log_probs == whole.log_probs
    assert len(part.policy_versions) == 7
