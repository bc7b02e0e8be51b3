"""The SGLang engine over servers that fail on purpose: retries, fail-over, affinity, weights, figures."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import torch

from spear_megatron.model.shape import ModelShape
from spear_megatron.observability.schema import check_names
from spear_megatron.rollout.engine import Engine, EngineError, GenerateRequest, SamplingParams
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.engine import SGLangEngine
from spear_megatron.testing import check_engine
from spear_megatron.testing.fake_sglang import FakeSGLang, next_token

SHAPE = ModelShape(
    architecture="qwen3", hidden_size=16, num_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=24, vocab_size=320, tie_word_embeddings=True, qkv_bias=False, qk_norm=True, rms_norm_eps=1e-6,
    rope_theta=1e4, max_position_embeddings=512,
)  # fmt: skip
QUICK = SGLangConfig(
    request_timeout_s=5.0, min_tokens_per_s=100.0, health_interval_s=0.05, health_timeout_s=1.0, health_failures=2,
    control_timeout_s=5.0,
)  # fmt: skip


def ask(name: str = "1-0-0/0/0", ids: tuple[int, ...] = (5, 6, 7), new: int = 4, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(name, ids, SamplingParams(new, **sampling), 0)


def expected(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, 320))
    return tuple(ids[len(prompt) :])


def make(*servers: FakeSGLang, settings: SGLangConfig = QUICK, limit: int = 8, **options: Any) -> SGLangEngine:
    values = {"max_in_flight": limit, "max_model_len": 256, **options}
    return SGLangEngine(SHAPE, settings, servers=[server.url for server in servers], **values)


@contextlib.asynccontextmanager
async def engine_of(*servers: FakeSGLang, **options: Any) -> AsyncIterator[SGLangEngine]:
    engine = make(*servers, **options)
    try:
        yield engine
    finally:
        await engine.close()


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))


def weights(scale: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(shape, scale)) for name, shape in SHAPE.parameter_shapes().items()]


def test_it_keeps_the_contract_of_engines() -> None:
    server = FakeSGLang(weight_version="1")

    async def start() -> Engine:
        await server.start()
        return make(server)

    check_engine(start, prompt_ids=(5, 6, 7, 8), vocab_size=320, exact=False, deadline_s=20)


def test_a_lost_attempt_is_repeated_under_a_new_id_and_counts_once() -> None:
    async def body() -> None:
        faults = ["error_500", "drop_after", None]
        async with FakeSGLang(faults=faults) as server, engine_of(server) as engine:  # type: ignore[arg-type]
            result = await engine.generate(ask())
            assert result.output_ids == expected((5, 6, 7), 4)
            rids = [rid for rid, _ in server.received]
            assert len(set(rids)) == 3 and server.aborted == rids[:2] and server.answered == rids[2:]
            assert server.sampled.keys() == set(rids[1:])  # sampled twice there, counted once here:
            stats = engine.stats
            assert (stats.num_requests, stats.num_retries, stats.total.num_lost) == (1, 2, 2)
            assert stats.total.num_sampled_tokens == 4 and stats.total.num_completed == 1

    run(body)


def test_retries_end() -> None:
    async def body() -> None:
        async with FakeSGLang(faults=["error_500"] * 9) as server, engine_of(server) as engine:
            with pytest.raises(EngineError, match=r"'1-0-0/0/0': 3 attempts were lost, the last: .*HTTP 500"):
                await engine.generate(ask())
            assert len(server.received) == 3 and engine.stats.num_retries == 2

    run(body)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ask(ids=(5, 320)), r"input_ids\[1\] = 320 is outside the vocabulary of 320"),
        (ask(ids=(-1,)), r"input_ids\[0\] = -1"),
        (ask(ids=()), "no input_ids"),
        (ask(ids=(1,) * 250, new=7), "exceed max_model_len=256"),
        (ask(temperature=-0.5), "temperature must be"),
        (ask(temperature=float("nan")), "temperature must be"),
        (ask(top_p=0.0), "top_p must lie"),
        (ask(top_k=0), "top_k must be"),
        (ask(new=0), "max_new_tokens must be"),
        (ask(stop_token_ids=(999,)), "stop_token_ids"),
    ],
)
def test_what_would_kill_a_server_is_never_sent(bad: GenerateRequest, message: str) -> None:
    async def body() -> None:
        async with FakeSGLang() as server, engine_of(server) as engine:
            with pytest.raises(ValueError, match=message):
                await engine.generate(bad)
            assert server.received == [] and server.dead is None

    run(body)


def test_an_id_under_way_is_refused() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.05) as server, engine_of(server) as engine:
            first = asyncio.create_task(engine.generate(ask()))
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="request_id is that of a request under way"):
                await engine.generate(ask())
            await first
            await engine.generate(ask())

    run(body)


def test_an_end_token_of_the_servers_own_does_not_end_a_request() -> None:
    tokens = expected((5, 6, 7), 8)

    async def body() -> None:
        async with FakeSGLang(eos_token_id=tokens[2], weight_version="1") as server, engine_of(server) as engine:
            result = await engine.generate(ask(new=8, stop_token_ids=(319,)))
            assert result.output_ids == tokens and result.finish_reason == "length"
            assert len(result.log_probs) == len(result.policy_versions) == 8
            assert [len(ids) for _, ids in server.received] == [3, 6]
            cut = await engine.generate(ask(new=3, stop_token_ids=(319,)))
            assert cut.output_ids == tokens[:3] and cut.finish_reason == "length"
            stopped = await engine.generate(ask(new=8, stop_token_ids=(tokens[4],)))
            assert stopped.output_ids == tokens[:5] and stopped.finish_reason == "stop"

    run(body)


def test_turns_of_a_trajectory_stay_at_one_server_and_hit_its_prefix_cache() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.001) as one, FakeSGLang(seconds_per_token=0.001) as two:
            async with engine_of(one, two) as engine:

                async def trajectory(sample: int) -> None:
                    ids = (5, 6, sample)
                    for turn in range(4):
                        result = await engine.generate(ask(f"1-0-{sample}/0/{turn}", ids))
                        ids = (*ids, *result.output_ids, 8, 9)

                await asyncio.gather(*map(trajectory, range(8)))
                homes: dict[str, set[str]] = {}
                for server in (one, two):
                    for key in server.routing_keys:
                        homes.setdefault(str(key), set()).add(server.url)
                assert len(homes) == 8 and all(len(urls) == 1 for urls in homes.values())
                assert len(one.received) == len(two.received) == 16  # new trajectories go to the least loaded
                # Turns 2 to 4 find all of the previous turn: prompts of 9, 15 and 21 tokens, 2 of them new.
                assert engine.stats.total.num_cached_tokens >= 8 * (7 + 13 + 19)
                assert engine.stats.num_moved_sessions == 0

    run(body)


def test_a_full_server_gives_its_sessions_to_one_with_room() -> None:
    async def body() -> None:
        async with FakeSGLang(faults=["hang"]) as one, FakeSGLang() as two:
            async with engine_of(one, two, limit=1) as engine:
                hanging = asyncio.create_task(engine.generate(ask("1-0-0/0/0")))
                while not one.received:
                    await asyncio.sleep(0.005)
                await engine.generate(ask("1-0-0/0/1"))
                assert len(two.received) == 1 and engine.stats.num_moved_sessions == 1
                await engine.abort(["1-0-0/0/0"])
                assert (await hanging).finish_reason == "abort"

    run(body)


def test_requests_of_a_dead_server_go_to_another_which_shares_them_once_it_is_back() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.01) as one, FakeSGLang(seconds_per_token=0.01) as two:
            async with engine_of(one, two) as engine:
                tasks = [asyncio.create_task(engine.generate(ask(f"1-0-{i}/0/0", (5, i), 20))) for i in range(8)]
                while len(one.received) < 4 or len(two.received) < 4:
                    await asyncio.sleep(0.005)
                await one.stop()
                results = await asyncio.gather(*tasks)
                assert [result.output_ids for result in results] == [expected((5, i), 20) for i in range(8)]
                assert len(two.answered) == 8 and engine.stats.total.num_sampled_tokens == 160
                assert engine.stats.take_metrics()["engine/servers_down"] == 1
                await one.start()
                while engine.stats.take_metrics()["engine/servers_down"]:
                    await asyncio.sleep(0.02)
                before = len(one.received)
                await asyncio.gather(*(engine.generate(ask(f"2-0-{i}/0/0", (6, i))) for i in range(4)))
                assert len(one.received) > before

    run(body)


def test_a_restarted_server_serves_again_once_it_has_the_current_weights() -> None:
    async def body() -> None:
        async with FakeSGLang(weight_version="4") as one, FakeSGLang(weight_version="4") as two:
            async with engine_of(one, two) as engine:
                engine.note_version(4)
                await engine.generate(ask())
                await one.stop()
                while not engine.stats.take_metrics()["engine/servers_down"]:
                    await asyncio.sleep(0.01)
                one.weight_version, before = "default", one.num_health_checks
                await one.start()
                while one.num_health_checks < before + 4:
                    await asyncio.sleep(0.01)
                assert engine.stats.take_metrics()["engine/servers_down"] == 1
                one.weight_version = "4"
                while engine.stats.take_metrics()["engine/servers_down"]:
                    await asyncio.sleep(0.01)

    run(body)


def test_a_server_that_hangs_is_found_by_its_health_and_left() -> None:
    async def body() -> None:
        async with FakeSGLang(faults=["hang"]) as one, FakeSGLang() as two:
            async with engine_of(one, two) as engine:
                task = asyncio.create_task(engine.generate(ask()))
                while not one.received:
                    await asyncio.sleep(0.005)
                one.healthy = False
                assert (await asyncio.wait_for(task, 3)).output_ids == expected((5, 6, 7), 4)
                assert len(two.answered) == 1

    run(body)


def test_with_no_server_left_the_wait_has_a_deadline_that_names_them() -> None:
    async def body() -> None:
        settings = dataclasses.replace(QUICK, request_timeout_s=0.4)
        async with FakeSGLang() as server, engine_of(server, settings=settings) as engine:
            await engine.generate(ask())
            await server.stop()
            with pytest.raises(EngineError, match=f"no SGLang server came back within .*0.4 s .{server.url}"):
                await engine.generate(ask())

    run(body)


def test_aborts_reach_running_and_waiting_requests_and_no_other() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.01) as server, engine_of(server, limit=2) as engine:
            names = ["1-0-1/0/0", "1-0-10/0/0", "1-0-2/0/0"]
            tasks = {name: asyncio.create_task(engine.generate(ask(name, new=60))) for name in names}
            while len(server.received) < 2:
                await asyncio.sleep(0.005)
            # The last still waits for a place.
            await engine.abort(["1-0-2/0/0", "1-0-1/0/0", "unknown"])
            results = {name: await task for name, task in tasks.items()}
            assert [results[name].finish_reason for name in names] == ["abort", "length", "abort"]
            assert results["1-0-2/0/0"].output_ids == () and len(server.received) == 2
            task = asyncio.create_task(engine.generate(ask(new=100)))
            while len(server.received) < 3:
                await asyncio.sleep(0.005)
            await engine.abort_all()
            assert (await task).finish_reason == "abort"

    run(body)


def test_an_abort_that_overtakes_its_request_is_repeated() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.05) as server, engine_of(server) as engine:
            server.arrival_delay_s = 0.2
            task = asyncio.create_task(engine.generate(ask(new=100)))
            while not server.received:
                await asyncio.sleep(0.005)
            await engine.abort(["1-0-0/0/0"])
            assert task.done() or (await asyncio.wait_for(task, 0.1))
            assert task.result().finish_reason == "abort" and len(server.aborted) == 2

    run(body)


def test_a_pause_keeps_requests_waiting() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.005) as server, engine_of(server) as engine:
            task = asyncio.create_task(engine.generate(ask(new=40)))
            while not server.sampled:
                await asyncio.sleep(0.005)
            await engine.pause("in_place")
            await asyncio.sleep(0.03)
            count = dict(server.sampled)
            server.weight_version = "7"
            await asyncio.sleep(0.05)
            assert not task.done() and server.sampled == count
            await engine.resume()
            assert (await task).output_ids == expected((5, 6, 7), 40)

    run(body)


def test_close_ends_pending_requests() -> None:
    async def body() -> None:
        async with FakeSGLang(faults=["hang"]) as server:
            engine = make(server)
            task = asyncio.create_task(engine.generate(ask()))
            while not server.received:
                await asyncio.sleep(0.005)
            await engine.close()
            await engine.close()
            with pytest.raises(EngineError, match="closed"):
                await asyncio.wait_for(task, 2)
            assert server.aborted == [server.received[0][0]]
            with pytest.raises(EngineError, match="closed"):
                engine.update_weights(weights(), 1)

    run(body)


def test_weights_go_to_every_server_and_tokens_know_their_version() -> None:
    async def body() -> None:
        async with FakeSGLang() as one, FakeSGLang(version="0.5.15") as two:
            settings = dataclasses.replace(QUICK, max_bucket_mb=1)
            async with engine_of(one, two, settings=settings) as engine:
                assert (await engine.generate(ask())).policy_versions == ()
                await asyncio.to_thread(engine.update_weights, weights(), 3)
                names = list(SHAPE.parameter_shapes())
                for server in (one, two):
                    assert [name for bucket in server.updates for name in bucket] == names
                    assert server.weight_version == "3"
                assert one.events == [
                    "pause_generation", "flush_cache", "begin_weight_update", "update_weights_from_tensor",
                    "end_weight_update", "flush_cache", "continue_generation",
                ]  # fmt: skip
                assert "begin_weight_update" not in two.events
                assert engine.version == 3
                for i in range(4):
                    assert (await engine.generate(ask(f"2-0-{i}/0/0"))).policy_versions == (3,) * 4

    run(body)


def test_a_request_that_lives_through_an_update_has_tokens_of_two_versions() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.01, weight_version="1") as server, engine_of(server) as engine:
            engine.note_version(1)
            task = asyncio.create_task(engine.generate(ask(new=40)))
            while not server.sampled:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(engine.update_weights, weights(), 2)
            versions = (await task).policy_versions
            assert len(versions) == 40 and set(versions) == {1, 2} and list(versions) == sorted(versions)

    run(body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items[1:], "1 weights are missing, first 'model.embed_tokens.weight'"),
        (lambda items: [*items, items[0]], "given twice"),
        (lambda items: [*items, ("model.other", torch.ones(2))], "'model.other' is unknown"),
        (lambda items: [(items[0][0], torch.ones(3, 3)), *items[1:]], r"has shape \(3, 3\), expected \(320, 16\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_generated_with_them(change: Any, message: str) -> None:
    async def body() -> None:
        async with FakeSGLang() as server, engine_of(server) as engine:
            with pytest.raises(ValueError, match=message):
                await asyncio.to_thread(engine.update_weights, change(weights()), 4)
            assert server.weight_version == "default" and engine.version is None
            with pytest.raises(EngineError, match="no complete weights .the update to version 4 failed"):
                await engine.generate(ask())
            await asyncio.to_thread(engine.update_weights, weights(), 5)
            assert (await engine.generate(ask())).policy_versions == (5,) * 4

    run(body)


def test_a_server_restarted_without_weights_is_noticed() -> None:
    async def body() -> None:
        async with FakeSGLang() as server, engine_of(server) as engine:
            await asyncio.to_thread(engine.update_weights, weights(), 1)
            server.weight_version = "default"
            with pytest.raises(EngineError, match="unnumbered weights, while version 1.*restarted without them"):
                await engine.generate(ask())

    run(body)


def test_an_engine_that_does_not_send_leaves_it_to_the_one_that_does() -> None:
    async def body() -> None:
        async with FakeSGLang() as server:
            async with engine_of(server) as first, engine_of(server, sends_weights=False) as second:
                await asyncio.to_thread(first.update_weights, weights(), 2)
                await asyncio.to_thread(second.update_weights, weights(), 2)
                assert server.events.count("update_weights_from_tensor") == 1 and second.version == 2

    run(body)


def test_a_server_that_is_not_there_does_not_stop_the_others() -> None:
    async def body() -> None:
        async with FakeSGLang() as gone:
            pass
        async with FakeSGLang() as server, engine_of(server, gone) as engine:
            results = await asyncio.gather(*(engine.generate(ask(f"1-0-{i}/0/0")) for i in range(3)))
            assert len(results) == 3 and len(server.received) == 3

    run(body)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "0.5.14"}, "runs SGLang 0.5.14: start one of 0.5.15 or newer"),
        ({"context_length": 257}, r"holds 257 tokens of a request .--context-length.*max_model_len=256 needs 262"),
    ],
)
def test_servers_that_cannot_serve_the_lengths_or_are_too_old_are_refused_by_name(
    options: dict[str, Any], message: str
) -> None:
    async def body() -> None:
        async with FakeSGLang(**options) as server, engine_of(server) as engine:
            with pytest.raises(ValueError, match=f"{server.url} {message}"):
                await engine.generate(ask())
            assert server.received == []

    run(body)


def test_a_router_gets_the_requests_and_the_servers_the_rest() -> None:
    async def body() -> None:
        async with FakeSGLang(seconds_per_token=0.01) as router, FakeSGLang() as one, FakeSGLang() as two:
            settings = dataclasses.replace(QUICK, router=router.url)
            async with engine_of(one, two, settings=settings) as engine:
                await engine.generate(ask("1-0-0/0/0"))
                task = asyncio.create_task(engine.generate(ask("1-0-0/0/1", new=50)))
                while len(router.received) < 2:
                    await asyncio.sleep(0.005)
                await engine.abort(["1-0-0/0/1"])
                rid = router.received[1][0]
                assert set(one.aborted) == set(two.aborted) == {rid} and router.aborted == []
                assert router.routing_keys == ["1-0-0", "1-0-0"] and rid.split("_t")[0].endswith("1-0-0")
                assert one.received == two.received == []
                await task

    run(body)


def test_figures_are_those_of_the_step_and_in_the_schema() -> None:
    async def body() -> None:
        async with FakeSGLang(faults=["error_500"]) as server, engine_of(server) as engine:
            await engine.generate(ask())
            figures = engine.stats.take_metrics()
            check_names(figures)
            assert figures["engine/requests"] == 1 and figures["engine/retries"] == 1
            assert figures["engine/sampled_tokens"] == 4 and figures["engine/lost"] == 1
            port = server.url.rpartition(":")[2]
            assert figures[f"engine_server/127.0.0.1-{port}/sampled_tokens"] == 4
            assert not any(engine.stats.take_metrics().values())

    run(body)
