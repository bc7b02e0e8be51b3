"""One server's client against a server that fails on purpose: deadlines, lost requests, aborts, bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from spear_megatron.rollout.engine import EngineError, GenerateRequest, SamplingParams
from spear_megatron.rollout.sglang.client import RequestLost, ServerClient
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.protocol import Completion, ProtocolError
from spear_megatron.testing.fake_sglang import FakeSGLang, log_prob_of, next_token

VOCAB = 320
QUICK = SGLangConfig(request_timeout_s=5.0, min_tokens_per_s=100.0, control_timeout_s=5.0)


def ask(*ids: int, new: int = 4, **sampling: Any) -> GenerateRequest:
    return GenerateRequest("1-0-0/0/0", ids or (5, 6, 7), SamplingParams(new, **sampling), 0)


def expected(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, VOCAB))
    return tuple(ids[len(prompt) :])


@asynccontextmanager
async def client_of(server: FakeSGLang, settings: SGLangConfig = QUICK, limit: int = 8) -> AsyncIterator[ServerClient]:
    client = ServerClient(server.url, max_in_flight=limit, settings=settings, vocab_size=VOCAB)
    try:
        yield client
    finally:
        await client.close()


async def send(client: ServerClient, request: GenerateRequest, rid: str = "R") -> Completion:
    async with client.slot():
        return await client.generate(request, rid=rid, session="1-0-0")


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_completion_has_the_servers_tokens_and_log_probs() -> None:
    async def body() -> None:
        async with FakeSGLang(weight_version="12") as server, client_of(server) as client:
            result = await send(client, ask(new=6))
            assert result.output_ids == expected((5, 6, 7), 6) and result.finish == "length"
            assert result.log_probs == tuple(map(log_prob_of, result.output_ids))
            assert result.policy_versions == (12,) * 6
            assert server.routing_keys == ["1-0-0"] and client.load == 0
            again = await send(client, ask(5, 6, 7, *result.output_ids, 9), "R2")
            assert again.num_cached_tokens == 9 and client.stats.num_cached_tokens == 9
            assert client.stats.num_sampled_tokens == 10 and client.stats.num_completed == 2

    run(body)


@pytest.mark.parametrize("fault", ["error_500", "unavailable", "drop_before", "drop_after", "drop_inside"])
def test_a_lost_request_is_aborted_before_it_may_be_repeated_and_its_tokens_never_count(fault: Any) -> None:
    async def body() -> None:
        async with FakeSGLang(faults=[fault]) as server, client_of(server) as client:
            with pytest.raises(RequestLost, match=f"{server.url}.*'R'") as lost:
                await send(client, ask())
            assert lost.value.retry and not lost.value.gone
            assert server.aborted == ["R"]
            assert client.stats.num_sampled_tokens == client.stats.num_completed == 0 and client.stats.num_lost == 1
            assert len(server.received) == 1  # the client itself repeats nothing
            assert (await send(client, ask(), "R2")).output_ids == expected((5, 6, 7), 4)

    run(body)


def test_a_hanging_request_ends_at_its_deadline_and_is_aborted() -> None:
    settings = SGLangConfig(request_timeout_s=0.2, min_tokens_per_s=40.0)

    async def body() -> None:
        async with FakeSGLang(faults=["hang"]) as server, client_of(server, settings) as client:
            match = r"3 prompt tokens, max_new_tokens=4.*within 0\.3 s = sglang\.request_timeout_s=0\.2 \+ 4"
            with pytest.raises(RequestLost, match=match) as lost:
                await send(client, ask())
            assert not lost.value.retry and not lost.value.gone
            assert server.aborted == ["R"] and client.stats.num_sampled_tokens == 0

    run(body)


def test_the_deadline_grows_with_the_token_budget() -> None:
    settings = SGLangConfig(request_timeout_s=0.1, min_tokens_per_s=20.0)

    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.02) as server, client_of(server, settings) as client:
            assert len((await send(client, ask(new=20))).output_ids) == 20

    run(body)


def test_refusals_are_not_repeated_and_say_what_the_server_says() -> None:
    async def body() -> None:
        async with FakeSGLang(context_length=6) as server, client_of(server) as client:
            with pytest.raises(RequestLost, match="HTTP 400 for 'R': Requested token count exceeds") as lost:
                await send(client, ask())
            assert not lost.value.retry and not lost.value.gone and server.aborted == []

    run(body)


def test_an_answer_with_a_wrong_count_is_refused() -> None:
    async def body() -> None:
        async with FakeSGLang(faults=["wrong_count"]) as server, client_of(server) as client:
            with pytest.raises(ProtocolError, match=f"{server.url}: request 'R': 4 tokens but 3 log-probs"):
                await send(client, ask())
            assert client.stats.num_sampled_tokens == 0 and client.stats.num_lost == 1

    run(body)


def test_a_server_that_is_gone_is_told_apart() -> None:
    async def body() -> None:
        async with FakeSGLang() as server, client_of(server) as client:
            await send(client, ask())
            assert await client.is_healthy(1.0)
            await server.stop()
            with pytest.raises(RequestLost, match="no connection") as lost:
                await send(client, ask(), "R2")
            assert lost.value.retry and lost.value.gone
            assert not await client.is_healthy(1.0) and not await client.abort("R2")
            with pytest.raises(EngineError, match="/get_server_info"):
                await client.get("/get_server_info")

    run(body)


def test_no_more_requests_than_allowed_are_at_the_server() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.002) as server, client_of(server, limit=5) as client:
            answers = await asyncio.gather(*(send(client, ask(5, i), f"R{i:03d}") for i in range(40)))
            assert [len(answer.output_ids) for answer in answers] == [4] * 40
            assert server.peak == 5 and client.load == 0

    run(body)


def test_cancelling_aborts_at_the_server_and_frees_the_place() -> None:
    async def body() -> None:
        async with FakeSGLang(faults=["hang"]) as server, client_of(server, limit=1) as client:
            task = asyncio.create_task(send(client, ask()))
            while not server.received:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len((await send(client, ask(), "R2")).output_ids) == 4
            assert server.aborted == ["R"]

    run(body)


def test_an_abort_returns_what_was_sampled() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.02, weight_version="3") as server, client_of(server) as client:
            task = asyncio.create_task(send(client, ask(new=200)))
            while server.sampled.get("R", 0) < 3:
                await asyncio.sleep(0.01)
            assert await client.abort("R")
            result = await task
            assert result.finish == "abort" and 3 <= len(result.output_ids) < 100
            assert result.output_ids == expected((5, 6, 7), len(result.output_ids))
            assert len(result.policy_versions) == len(result.output_ids) and client.stats.num_aborted == 1

    run(body)


def test_a_server_that_goes_down_loses_running_and_waiting_requests_at_once() -> None:
    async def body() -> None:
        async with FakeSGLang(faults=["hang"]) as server, client_of(server, limit=1) as client:
            tasks = [asyncio.create_task(send(client, ask(), f"R{i}")) for i in range(3)]
            while not server.received:
                await asyncio.sleep(0.01)
            assert client.load == 3
            client.mark_down("for a test")
            for task in tasks:
                with pytest.raises(RequestLost, match="down.*for a test") as lost:
                    await asyncio.wait_for(task, 2.0)
                assert lost.value.retry
            assert len(server.received) == 1 and client.is_down
            client.mark_up()
            assert len((await send(client, ask(), "R9")).output_ids) == 4

    run(body)


def test_a_connection_that_the_server_closes_after_an_error_takes_no_other_request_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spear_megatron.rollout.sglang import protocol

    async def body() -> None:
        async with FakeSGLang() as server, client_of(server) as client:
            with monkeypatch.context() as patch:
                patch.setattr(protocol, "_NEUTRAL", {"mystery": 1})
                with pytest.raises(RequestLost, match="HTTP 500"):
                    await send(client, ask())
            server.seconds_per_token = 0.02  # it is still under way when the old connection closes
            assert len((await send(client, ask(), "R2")).output_ids) == 4

    run(body)
