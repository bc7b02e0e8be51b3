"""Generating with an OpenAI-compatible server: for evaluation only, as its weights cannot be replaced."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import torch

from spear_megatron.rollout.engine import EngineError, GenerateRequest, GenerateResult
from spear_megatron.rollout.openai.protocol import Answer, completion_payload, parse_answer
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.protocol import error_message
from spear_megatron.rollout.validate import check_request

_PASSING_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
_UNKNOWN_KEY_STATUS = (400, 422)
_CONNECT_S = 10.0
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 20.0


@dataclass(slots=True)
class OpenAIStats:
    """Counts since the engine was made; tokens are those of complete answers."""

    num_requests: int = 0
    num_retries: int = 0
    num_sampled_tokens: int = 0
    num_tokenised_again: int = 0


class _Passing(Exception):
    """An attempt that may be repeated after ``delay_s`` (None: the engine's own pause)."""

    def __init__(self, message: str, delay_s: float | None = None) -> None:
        super().__init__(message)
        self.delay_s = delay_s


class OpenAIEngine:
    """Completes requests at one server. Implements ``rollout.engine.Engine``, but for the weights.

    Tokens have no log-probs here: they are NaN, which no evaluation reads. All calls come from one asyncio loop.

    Args:
        server: URL, with or without /v1 at its end.
        model: name that the server serves the model by.
        settings: deadlines and retries.
        vocab_size, encode, decode: of the model's tokenizer; they serve servers that return no token ids.
        max_in_flight: requests at a time.
        max_model_len: most tokens of prompt and completion together.
        api_key: sent as a bearer token, if not None.
        api_key_name: where the key comes from, for messages.
    """

    def __init__(
        self,
        server: str,
        *,
        model: str,
        settings: SGLangConfig,
        vocab_size: int,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        max_in_flight: int,
        max_model_len: int,
        api_key: str | None = None,
        api_key_name: str = "the API key",
    ) -> None:
        self.url, self.model = base_url(server), model
        self.stats = OpenAIStats()
        self._settings, self._vocab_size, self._max_model_len = settings, vocab_size, max_model_len
        self._encode, self._decode = encode, decode
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._api_key_name = api_key_name
        self._slots = asyncio.Semaphore(max_in_flight)
        self._http: aiohttp.ClientSession | None = None
        self._extended = True
        self._closed = False

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Complete one request.

        Raises:
            ValueError: it can never be served, or the server refuses the API key or does not know the model.
            EngineError: no answer came in time, it was of no use, or the engine is closed.
        """
        check_request(request, vocab_size=self._vocab_size, max_model_len=self._max_model_len)
        if self._closed:
            raise EngineError(f"the engine was closed: request {request.request_id!r} cannot run")
        self.stats.num_requests += 1
        async with self._slots:
            answer = await self._with_retries(request)
        self.stats.num_sampled_tokens += len(answer.output_ids)
        self.stats.num_tokenised_again += not answer.exact
        unknown = (math.nan,) * len(answer.output_ids)
        return GenerateResult(answer.output_ids, unknown, answer.finish)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Not possible through this API. Raises EngineError."""
        raise EngineError(f"{self.url}: weights cannot be sent to an OpenAI-compatible server")

    async def close(self) -> None:
        """Close the connections; pending requests fail. Closing twice is harmless."""
        self._closed = True
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _with_retries(self, request: GenerateRequest) -> Answer:
        delay_s, lost = _FIRST_DELAY_S, ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                self.stats.num_retries += 1
            try:
                return await self._attempt(request)
            except _Passing as error:
                lost = str(error)
                if self._closed or attempt == self._settings.retries:
                    break
                await asyncio.sleep(min(error.delay_s or delay_s, _LONGEST_DELAY_S))
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
        raise EngineError(f"{request.request_id!r}: {self._settings.retries + 1} attempts were lost, the last: {lost}")

    async def _attempt(self, request: GenerateRequest) -> Answer:
        """One answer; the request is sent again at once, without extensions, to a server that refuses those."""
        extended = self._extended
        status, text, headers = await self._post(request, extended)
        if extended and status in _UNKNOWN_KEY_STATUS:
            refused = error_message(text, _json(text))
            status, text, headers = await self._post(request, False)
            if status == 200:
                self._extended = False  # it knows OpenAI's own keys only
            else:
                text = f"{refused} (and without extensions: {error_message(text, _json(text))})"
        where = f"{self.url}/v1/completions: request {request.request_id!r}"
        if status != 200:
            self._refused(where, status, error_message(text, _json(text)), headers)
        try:
            return parse_answer(_json(text), request=request, vocab_size=self._vocab_size, encode=self._encode)
        except EngineError as error:
            raise EngineError(f"{where}: {error}") from error

    def _refused(self, where: str, status: int, message: str, headers: Mapping[str, str]) -> None:
        if status in (401, 403):
            raise ValueError(f"{where}: HTTP {status}: {message}: check {self._api_key_name}")
        if status == 404:
            raise ValueError(f"{where}: HTTP 404: {message}: check --server and --served-model ({self.model})")
        if status in _PASSING_STATUS:
            raise _Passing(f"{where}: HTTP {status}: {message}", _seconds(headers.get("Retry-After")))
        raise EngineError(f"{where}: HTTP {status}: {message}")

    async def _post(self, request: GenerateRequest, extended: bool) -> tuple[int, str, Mapping[str, str]]:
        body = completion_payload(request, self.model, extended=extended, decode=self._decode)
        deadline_s = self._settings.deadline_s(request.sampling.max_new_tokens)
        timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=_CONNECT_S)
        url = f"{self.url}/v1/completions"
        try:
            async with self._session().post(url, json=body, headers=self._headers, timeout=timeout) as response:
                return response.status, await response.text(), response.headers
        except aiohttp.ConnectionTimeoutError as error:
            raise _Passing(f"{url}: no connection within {_CONNECT_S:g} s") from error
        except TimeoutError as error:
            raise EngineError(
                f"{url}: request {request.request_id!r} did not finish within {deadline_s:g} s = "
                "sglang.request_timeout_s + its tokens / sglang.min_tokens_per_s"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Passing(f"{url}: {type(error).__name__}: {error}") from error

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        return self._http


def base_url(server: str) -> str:
    """The URL without /v1 and slashes at its end."""
    return server.rstrip("/").removesuffix("/v1").rstrip("/")


def _seconds(text: str | None) -> float | None:
    """The header Retry-After where it is a number."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
