"""The contract of engines."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from spear_megatron.rollout.engine import (
    AbortableEngine,
    Engine,
    EngineError,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
)
from spear_megatron.testing.contract import ContractError, require, served


def check_engine(
    factory: Callable[[], Engine | Awaitable[Engine]],
    *,
    prompt_ids: Sequence[int],
    vocab_size: int,
    exact: bool = True,
    deadline_s: float = 120.0,
) -> None:
    """Check the engine that ``factory`` makes, its weights loaded, on prompts around ``prompt_ids``.

    Checked: lengths, vocabulary, log-probs at most 0, finish reasons; token limits and stop tokens; that requests which
    can never be served are ValueErrors; that a request without noise (temperature 0) does not depend on its key; that
    an engine which can abort ends a request where it is; and that after ``close`` requests fail with EngineError. With
    ``exact`` also that equal requests give bit-equal results, alone and among others. Every call has ``deadline_s``
    seconds.

    Raises:
        ContractError: naming the broken rule.
    """
    asyncio.run(_check(factory, tuple(prompt_ids), vocab_size, exact, deadline_s))


async def _check(
    factory: Callable[[], Engine | Awaitable[Engine]],
    prompt: tuple[int, ...],
    vocab_size: int,
    exact: bool,
    deadline_s: float,
) -> None:
    made = factory()
    engine = await made if isinstance(made, Awaitable) else made
    require(isinstance(engine, Engine), f"{type(engine).__name__} lacks one of generate, update_weights, close")

    async def generate(request: GenerateRequest) -> GenerateResult:
        result = await served(f"request {request.request_id}", engine.generate(request), deadline_s)
        _check_result(request, result, vocab_size)
        return result

    plain = GenerateRequest("plain", prompt, SamplingParams(max_new_tokens=12), noise_key=1)
    result = await generate(plain)
    require(len(result.output_ids) == 12, f"12 tokens without stop tokens were asked for, got {len(result.output_ids)}")
    await _check_stop(generate, plain, result, exact)
    greedy = dataclasses.replace(plain, request_id="greedy", sampling=SamplingParams(max_new_tokens=6, temperature=0.0))
    first = await generate(greedy)
    second = await generate(dataclasses.replace(greedy, request_id="greedy again", noise_key=2))
    require(first.output_ids == second.output_ids, "greedy requests must not depend on the noise key")
    if exact:
        await _check_exact(generate, plain, result)
    if isinstance(engine, AbortableEngine):
        await _check_abort(engine, plain, result, exact, deadline_s)
    await _check_refusals(engine, plain, vocab_size, deadline_s)
    await served("close", engine.close(), deadline_s)
    await _expect(EngineError, "a request after close", engine.generate(plain), deadline_s)


def _check_result(request: GenerateRequest, result: GenerateResult, vocab_size: int) -> None:
    what = f"request {request.request_id}"
    require(isinstance(result, GenerateResult), f"{what}: expected a GenerateResult, got {type(result).__name__}")
    num_tokens = len(result.output_ids)
    require(len(result.log_probs) == num_tokens, f"{what}: {num_tokens} tokens but {len(result.log_probs)} log-probs")
    require(
        1 <= num_tokens <= request.sampling.max_new_tokens,
        f"{what}: {num_tokens} tokens for max_new_tokens={request.sampling.max_new_tokens}",
    )
    require(all(0 <= token < vocab_size for token in result.output_ids), f"{what}: a token outside the vocabulary")
    require(all(value <= 1e-5 for value in result.log_probs), f"{what}: a log-prob above 0 or not a number")
    require(result.finish_reason in ("stop", "length"), f"{what}: finish_reason {result.finish_reason!r}")
    stops = set(request.sampling.stop_token_ids)
    ended = result.output_ids[-1] in stops
    stopped = result.finish_reason == "stop"
    require(ended == stopped, f"{what}: finish_reason 'stop' must go with a stop token at the end")
    require(not stops & set(result.output_ids[:-1]), f"{what}: went on after a stop token")
    if result.finish_reason == "length":
        require(num_tokens == request.sampling.max_new_tokens, f"{what}: finish_reason 'length' before the limit")
    versions = result.policy_versions
    require(len(versions) in (0, num_tokens), f"{what}: {len(versions)} policy versions for {num_tokens} tokens")


async def _check_stop(
    generate: Callable[[GenerateRequest], Awaitable[GenerateResult]],
    request: GenerateRequest,
    whole: GenerateResult,
    exact: bool,
) -> None:
    """With its fifth token as a stop token, the same request must end at that token's first occurrence."""
    stop = whole.output_ids[4]
    end = whole.output_ids.index(stop) + 1
    sampling = dataclasses.replace(request.sampling, stop_token_ids=(stop,))
    result = await generate(dataclasses.replace(request, request_id="stop", sampling=sampling))
    if exact and result.output_ids != whole.output_ids[:end]:
        raise ContractError(
            f"with stop token {stop} the request gave {result.output_ids}, expected {whole.output_ids[:end]}: "
            "noise must depend on the noise key and the position alone, and the stop token must be kept"
        )


async def _check_exact(
    generate: Callable[[GenerateRequest], Awaitable[GenerateResult]], request: GenerateRequest, alone: GenerateResult
) -> None:
    others = [
        dataclasses.replace(
            request, request_id=f"other {index}", input_ids=request.input_ids[: 1 + index % len(request.input_ids)],
            sampling=SamplingParams(max_new_tokens=3 + index), noise_key=100 + index,
        )
        for index in range(7)
    ]
    _, *rest = await asyncio.gather(*(generate(item) for item in (others[0], request, *others[1:])))
    among: GenerateResult = rest[0]
    require(among.output_ids == alone.output_ids, "a request gave other tokens among others than alone")
    require(among.log_probs == alone.log_probs, "a request gave other log-probs among others than alone")
    again = await generate(dataclasses.replace(request, request_id="again"))
    require(again.output_ids == alone.output_ids, "the same request gave other tokens the second time")
    keyed = [
        (await generate(dataclasses.replace(request, request_id=f"key {key}", noise_key=key))).output_ids
        for key in range(2, 8)
    ]
    require(any(ids != alone.output_ids for ids in keyed), "seven noise keys gave the same tokens")


async def _check_abort(
    engine: AbortableEngine, request: GenerateRequest, whole: GenerateResult, exact: bool, deadline_s: float
) -> None:
    """Two equal requests, of which one is aborted once both run: it returns a beginning of the other."""
    assert isinstance(engine, Engine)
    names = ("stays", "aborted")
    both = [asyncio.create_task(engine.generate(dataclasses.replace(request, request_id=name))) for name in names]
    await asyncio.sleep(0)
    await served("abort", engine.abort(("aborted", "never heard of")), deadline_s)
    stays, aborted = await served("requests of which one was aborted", asyncio.gather(*both), deadline_s)
    require(len(stays.output_ids) == len(whole.output_ids), "aborting one request touched another")
    ended = aborted.finish_reason == "abort" or len(aborted.output_ids) == len(whole.output_ids)
    require(ended, f"an aborted request must end with finish_reason 'abort', got {aborted.finish_reason!r}")
    require(len(aborted.log_probs) == len(aborted.output_ids), "an aborted request: one log-prob per token")
    beginning = whole.output_ids[: len(aborted.output_ids)]
    require(not exact or aborted.output_ids == beginning, "an aborted request must keep what it sampled so far")


async def _check_refusals(engine: Engine, request: GenerateRequest, vocab_size: int, deadline_s: float) -> None:
    sampling = request.sampling
    impossible = {
        "an empty prompt": dataclasses.replace(request, input_ids=()),
        "a token outside the vocabulary": dataclasses.replace(request, input_ids=(vocab_size,)),
        "a negative token": dataclasses.replace(request, input_ids=(-1,)),
        "max_new_tokens 0": dataclasses.replace(request, sampling=dataclasses.replace(sampling, max_new_tokens=0)),
        "temperature -1": dataclasses.replace(request, sampling=dataclasses.replace(sampling, temperature=-1.0)),
        "top_p 0": dataclasses.replace(request, sampling=dataclasses.replace(sampling, top_p=0.0)),
    }
    for what, bad in impossible.items():
        await _expect(ValueError, what, engine.generate(bad), deadline_s)


async def _expect(kind: type[Exception], what: str, call: Awaitable[GenerateResult], deadline_s: float) -> None:
    try:
        await asyncio.wait_for(call, deadline_s)
    except kind:
        return
    except TimeoutError as error:
        raise ContractError(f"{what} did not finish within {deadline_s:g} s") from error
    except Exception as error:
        raise ContractError(f"{what} must raise {kind.__name__}, it raised {type(error).__name__}: {error}") from error
    raise ContractError(f"{what} must raise {kind.__name__}, it was served")
