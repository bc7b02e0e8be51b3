"""The SGLang engine with a real server: the same tokens as the other engines, and what the server survives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from faulty_proxy import FaultyProxy

from spear_megatron.data.chat import ChatRenderer
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.agent_loop import EpisodeLimits, run_episode
from spear_megatron.rollout.embedded import EmbeddedEngine
from spear_megatron.rollout.engine import Engine, GenerateRequest, SamplingParams
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.engine import SGLangEngine
from spear_megatron.testing import check_engine
from spear_megatron.types import Prompt, RewardParts, Trajectory, TrajectoryId

MAX_MODEL_LEN = 512
SETTINGS = SGLangConfig(request_timeout_s=60.0, health_interval_s=0.5)


def make_engine(url: str, folder: Path, *, max_in_flight: int = 64, version: int | None = 0) -> SGLangEngine:
    """An engine at the server, which gets the folder's weights as ``version``."""
    shape = ModelShape.from_folder(folder)
    engine = SGLangEngine(
        shape, SETTINGS, servers=[url], max_in_flight=max_in_flight, max_model_len=MAX_MODEL_LEN
    )
    if version is not None:
        load(engine, folder, version)
    return engine


def load(engine: Engine, folder: Path, version: int) -> None:
    shape = ModelShape.from_folder(folder)
    with HFWeights.open(folder, shape) as weights:
        engine.update_weights([(name, weights.read(name)) for name in shape.parameter_shapes()], version)


def run(engine: SGLangEngine, body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Result of ``body`` in a loop of its own, after which the engine is closed."""

    async def whole() -> Any:
        try:
            return await asyncio.wait_for(body(), 120)
        finally:
            await engine.close()

    return asyncio.run(whole())


def ask(name: str, ids: tuple[int, ...], new: int, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(name, ids, SamplingParams(new, **sampling), 0)


def prompts(count: int, vocab_size: int = 400) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 40, (count,), generator=generator).tolist()
    return [tuple(torch.randint(vocab_size, (length,), generator=generator).tolist()) for length in lengths]


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Any:
    """The model in transformers, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def reference_log_probs(
    model: Any, prompt: tuple[int, ...], output: tuple[int, ...], temperature: float
) -> torch.Tensor:
    """log_softmax(logits / temperature) of ``output`` after ``prompt``: float32 [len(output)]."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(output)[:, None])[:, 0].float()


class Looking:
    """An environment that answers the first turns with a tool message, whatever they say."""

    def __init__(self, num_turns: int) -> None:
        self._left = num_turns

    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(messages=prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        self._left -= 1
        if self._left == 0:
            return StepResult(done=True)
        return StepResult(messages=({"role": "tool", "content": f"seen {self._left}"},), num_tool_calls=1)

    async def close(self) -> None: ...


async def no_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
    return RewardParts(0.0)


async def episodes(engine: Engine, renderer: ChatRenderer, count: int) -> list[Trajectory]:
    """Greedy episodes of three turns; every turn ends at one of many stop tokens, or the episode does by length."""
    limits = EpisodeLimits(
        max_turns=3, max_prompt_length=128, max_response_length=300, max_model_len=MAX_MODEL_LEN,
        max_tool_response_length=64,
    )  # fmt: skip
    sampling = SamplingParams(60, temperature=0.0, stop_token_ids=tuple(range(0, 450, 6)))
    return list(
        await asyncio.gather(
            *(
                run_episode(
                    engine=engine,
                    renderer=renderer,
                    environment=Looking(3),
                    reward=no_reward,
                    prompt=Prompt(f"p{i}", ({"role": "user", "content": f"What is {17 * i} + {i}?"},)),
                    trajectory_id=TrajectoryId(1, i, 0),
                    noise_key=i,
                    limits=limits,
                    sampling=sampling,
                )
                for i in range(count)
            )
        )
    )


def test_episodes_are_those_of_the_embedded_engine_and_hit_the_prefix_cache(
    sglang_server: str, tiny_folder: Path
) -> None:
    from transformers import AutoTokenizer

    renderer = ChatRenderer(AutoTokenizer.from_pretrained(str(tiny_folder)))
    embedded = EmbeddedEngine(ModelShape.from_folder(tiny_folder), max_num_seqs=8, max_model_len=MAX_MODEL_LEN)
    load(embedded, tiny_folder, 0)
    expected = asyncio.run(episodes(embedded, renderer, 12))
    engine = make_engine(sglang_server, tiny_folder, version=4)
    found = run(engine, lambda: episodes(engine, renderer, 12))
    assert max(trajectory.num_turns for trajectory in expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.error is None and one.stop_reason is other.stop_reason and one.num_turns == other.num_turns
        segment, known = one.segments[0], other.segments[0]
        assert segment.ids.tolist() == known.ids.tolist()
        assert segment.response_mask.tolist() == known.response_mask.tolist()
        assert float((segment.rollout_log_probs - known.rollout_log_probs).abs().max()) < 1e-4
        assert segment.policy_versions is not None
        assert set(segment.policy_versions[segment.response_mask].tolist()) == {4}
    total = engine.stats.total
    later = sum(trajectory.num_turns - 1 for trajectory in found)
    assert later > 0 and total.num_cached_tokens > 20 * later  # a later turn finds at least the opening prompt


def test_greedy_tokens_and_log_probs_are_those_of_transformers(
    sglang_server: str, tiny_folder: Path, reference: Any
) -> None:
    engine = make_engine(sglang_server, tiny_folder)
    rows = prompts(12)

    async def body() -> Any:
        greedy = [ask(f"1-{i}-0/0/0", ids, 24, temperature=0.0) for i, ids in enumerate(rows)]
        warm = [ask(f"2-{i}-0/0/0", ids, 24, temperature=0.6, top_p=0.9) for i, ids in enumerate(rows)]
        return await asyncio.gather(*map(engine.generate, [*greedy, *warm]))

    results = run(engine, body)
    with torch.inference_mode():
        for ids, result in zip(rows, results[:12], strict=True):
            expected = reference.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0
            )[0, len(ids) :]
            assert result.output_ids == tuple(expected.tolist())
    for ids, result, temperature in zip(rows * 2, results, [1.0] * 12 + [0.6] * 12, strict=True):
        known = reference_log_probs(reference, ids, result.output_ids, temperature)
        assert float((torch.tensor(result.log_probs) - known).abs().max()) < 1e-4


def test_it_keeps_the_contract_of_engines(sglang_server: str, tiny_folder: Path) -> None:
    vocab_size = ModelShape.from_folder(tiny_folder).vocab_size
    check_engine(
        lambda: make_engine(sglang_server, tiny_folder), prompt_ids=(5, 6, 7, 8), vocab_size=vocab_size, exact=False
    )


def test_answers_that_are_lost_are_asked_for_again_and_count_once(sglang_server: str, tiny_folder: Path) -> None:
    """HTTP 500 with a closed connection before the server saw the request, and a connection lost after it answered."""
    rows, known = prompts(4), make_engine(sglang_server, tiny_folder)

    async def ask_all(engine: SGLangEngine) -> list[tuple[int, ...]]:
        requests = [ask(f"3-{i}-0/0/0", ids, 24, temperature=0.0) for i, ids in enumerate(rows)]
        return [(await engine.generate(request)).output_ids for request in requests]

    expected = run(known, lambda: ask_all(known))

    async def through_faults() -> None:
        async with FaultyProxy(sglang_server, ["error_500", None, "drop_after", "error_500"]) as proxy:
            engine = await asyncio.to_thread(make_engine, proxy.url, tiny_folder)
            try:
                assert await ask_all(engine) == expected
            finally:
                await engine.close()
            stats = engine.stats
            assert (stats.num_requests, stats.num_retries, stats.total.num_lost) == (4, 3, 3)
            assert stats.total.num_completed == 4 and stats.total.num_sampled_tokens == 4 * 24
            assert proxy.num_generations == 5  # one answer was dropped: sampled twice there, counted once here

    asyncio.run(asyncio.wait_for(through_faults(), 120))


def test_what_kills_a_server_is_refused_before_it_is_sent(sglang_server: str, tiny_folder: Path) -> None:
    engine = make_engine(sglang_server, tiny_folder)
    vocab_size = ModelShape.from_folder(tiny_folder).vocab_size
    killers: Mapping[str, GenerateRequest] = {
        "vocabulary": ask("a", (5, vocab_size), 4),
        "-1": ask("b", (-1, 5), 4),
        "no input_ids": ask("c", (), 4),
        "exceed max_model_len": ask("d", (5,) * (MAX_MODEL_LEN - 3), 4),
        "temperature": ask("e", (5,), 4, temperature=-1.0),
        "top_p": ask("f", (5,), 4, top_p=1.5),
        "top_k": ask("g", (5,), 4, top_k=0),
        "max_new_tokens": ask("h", (5,), 0),
    }

    async def body() -> None:
        for words, request in killers.items():
            with pytest.raises(ValueError, match=words):
                await engine.generate(request)
        first = asyncio.create_task(engine.generate(ask("same", (5, 6), 200)))
        await asyncio.sleep(0.05)
        with pytest.raises(ValueError, match="under way"):
            await engine.generate(ask("same", (5, 6), 4))
        await first
        longest = await engine.generate(ask("longest", (7,) * (MAX_MODEL_LEN - 1), 1))
        assert len(longest.output_ids) == 1

    run(engine, body)
    wrong = make_engine(sglang_server, tiny_folder, version=None)
    with pytest.raises(ValueError, match="has shape"):
        wrong.update_weights([("model.embed_tokens.weight", torch.ones(2, 2))], 9)
    asyncio.run(wrong.close())
    engine = make_engine(sglang_server, tiny_folder)  # it lives, and takes weights again
    result = run(engine, lambda: engine.generate(ask("alive", (5, 6), 4)))
    assert len(result.output_ids) == 4


def test_stop_tokens_end_a_request_and_the_servers_own_do_not(sglang_server: str, tiny_folder: Path) -> None:
    engine = make_engine(sglang_server, tiny_folder)

    async def body() -> None:
        greedy = await engine.generate(ask("g", (9, 60, 7), 40, temperature=0.0))
        stop = greedy.output_ids[20]
        end = greedy.output_ids.index(stop) + 1
        result = await engine.generate(ask("s", (9, 60, 7), 40, temperature=0.0, stop_token_ids=(stop,)))
        assert result.finish_reason == "stop" and result.output_ids == greedy.output_ids[:end]
        # Many tokens at a high temperature: end tokens of the model's own turn up and must not end these.
        many = [ask(f"m{i}", (9, i), 60, temperature=5.0, stop_token_ids=(451,)) for i in range(24)]
        ends = 0
        for result in await asyncio.gather(*map(engine.generate, many)):
            assert (result.finish_reason == "stop") == (result.output_ids[-1] == 451)
            assert result.finish_reason == "stop" or len(result.output_ids) == 60
            ends += sum(token in (0, 2) for token in result.output_ids[:-1])
        assert ends > 0

    run(engine, body)


def test_aborts_end_one_request_of_two_with_ids_that_begin_alike(sglang_server: str, tiny_folder: Path) -> None:
    engine = make_engine(sglang_server, tiny_folder, version=6)

    async def body() -> None:
        tasks = [asyncio.create_task(engine.generate(ask(name, (5, 6), 400))) for name in ("1-0-1/0/0", "1-0-10/0/0")]
        await asyncio.sleep(0.3)
        await engine.abort(["1-0-1/0/0"])
        aborted, other = await asyncio.gather(*tasks)
        assert aborted.finish_reason == "abort" and len(aborted.output_ids) < 400
        assert len(aborted.log_probs) == len(aborted.policy_versions) == len(aborted.output_ids)
        assert other.finish_reason == "length" and len(other.output_ids) == 400

    run(engine, body)


def test_more_requests_than_places(sglang_server: str, tiny_folder: Path) -> None:
    engine = make_engine(sglang_server, tiny_folder, max_in_flight=64)

    async def body() -> Any:
        return await asyncio.gather(*(engine.generate(ask(f"1-{i}-0/0/0", (5, i), 16)) for i in range(150)))

    results = run(engine, body)
    assert [len(result.output_ids) for result in results] == [16] * 150
    assert engine.stats.total.num_lost == engine.stats.num_retries == 0


def test_tokens_of_a_request_that_lives_through_an_update_know_their_versions(
    sglang_server: str, tiny_folder: Path, server_version: tuple[int, ...]
) -> None:
    needs(server_version, (0, 5, 21), "an update under running requests")
    engine = make_engine(sglang_server, tiny_folder, version=1)

    async def through_update(version: int, wait_s: float) -> tuple[int, ...]:
        task = asyncio.create_task(engine.generate(ask("1-0-0/0/0", (5, 6, 7), 450)))
        await asyncio.sleep(wait_s)
        await asyncio.to_thread(load, engine, tiny_folder, version + 1)
        return (await task).policy_versions

    async def body() -> None:
        met = False
        for index, wait_s in enumerate((0.3, 0.1, 0.6, 1.2)):  # how fast the server is, is not known
            if met:
                break
            versions = await through_update(1 + index, wait_s)
            assert len(versions) == 450 and list(versions) == sorted(versions)
            assert set(versions) <= {1 + index, 2 + index}
            met = len(set(versions)) == 2
        assert met, "no update met a running request"

    run(engine, body)
