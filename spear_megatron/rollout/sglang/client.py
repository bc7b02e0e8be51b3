"""One SGLang server as a generating client sees it: bounded requests, deadlines, and what became of a lost request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from spear_megatron.rollout.engine import EngineError, GenerateRequest
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.protocol import (
    Completion,
    ProtocolError,
    error_message,
    generate_payload,
    parse_completion,
)

_CONNECT_S = 10.0
_ABORT_S = 10.0
_POLL_S = 0.005
_PASSING_STATUS = (429, 500, 502, 503, 504)
ROUTING_HEADER = "X-SMG-Routing-Key"


class RequestLost(EngineError):
    """An attempt without an answer; whatever the server sampled for it is never counted.

    Attributes:
        retry: the same request may be sent again, under a new id: nothing of the old one runs on where the server
            answered its abort.
        gone: the server did not answer, or could not confirm the abort.
    """

    def __init__(self, message: str, *, retry: bool, gone: bool) -> None:
        super().__init__(message)
        self.retry = retry
        self.gone = gone


@dataclass(slots=True)
class ServerStats:
    """Counts of one server since its client was made. Tokens are those of complete answers only."""

    num_attempts: int = 0
    num_completed: int = 0
    num_lost: int = 0
    num_aborted: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_sampled_tokens: int = 0


class ServerClient:
    """Generates with the server at ``url`` (or the router there). Every call comes from one asyncio loop.

    Args:
        max_in_flight: requests at the server at a time; further ones wait in order of arrival.
        settings: deadlines.
        vocab_size: tokens that an answer may hold.
        abort_urls: servers that are told of an abort, the server itself by default; behind a router each of them.
    """

    def __init__(
        self,
        url: str,
        *,
        max_in_flight: int,
        settings: SGLangConfig,
        vocab_size: int,
        abort_urls: Sequence[str] = (),
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, got {max_in_flight}")
        self.url = url.rstrip("/")
        self.max_in_flight = max_in_flight
        self.stats = ServerStats()
        self.load = 0  # requests at the server or waiting for a slot
        self._abort_urls = tuple(item.rstrip("/") for item in abort_urls) or (self.url,)
        self._settings = settings
        self._vocab_size = vocab_size
        self._slots = asyncio.Semaphore(max_in_flight)
        self._http: aiohttp.ClientSession | None = None
        self._down: asyncio.Future[str] | None = None
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def is_down(self) -> bool:
        """Whether :meth:`mark_down` was called since the last :meth:`mark_up`."""
        return self._down is not None and self._down.done()

    @property
    def down_reason(self) -> str:
        """Why the server is down, or an empty text."""
        return self._down.result() if self._down is not None and self._down.done() else ""

    def mark_down(self, reason: str) -> None:
        """Let no request wait for this server any more: pending ones are lost and may be sent elsewhere."""
        down = self._down_future()
        if not down.done():
            down.set_result(reason)

    def mark_up(self) -> None:
        """Serve again."""
        if self.is_down:
            self._down = None

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the ``max_in_flight`` places at the server, for one :meth:`generate`.

        Raises:
            RequestLost: the server went down before a place was free; nothing was sent.
        """
        self.load += 1
        try:
            async with self._slots:
                if self.is_down:
                    raise RequestLost(f"{self.url} is down ({self.down_reason})", retry=True, gone=False)
                yield
        finally:
            self.load -= 1

    async def generate(self, request: GenerateRequest, *, rid: str, session: str) -> Completion:
        """One attempt at a checked request; the caller holds a :meth:`slot`. Cancelling it aborts at the server.

        Args:
            rid: id of this attempt, never used before.
            session: the conversation, which routers keep at one server.

        Raises:
            RequestLost: no complete answer came; says whether the request may be sent again.
            ProtocolError: the answer contradicts itself or the request.
        """
        self.stats.num_attempts += 1
        try:
            status, text = await self._answer(request, rid, session)
            content = _json(text)
            if status != 200:
                await self._refused(rid, status, error_message(text, content))
            completion = parse_completion(content, rid=rid, request=request, vocab_size=self._vocab_size)
        except ProtocolError as error:
            self.stats.num_lost += 1
            raise ProtocolError(f"{self.url}: {error}") from error
        except (RequestLost, asyncio.CancelledError):
            self.stats.num_lost += 1
            raise
        self._count(completion)
        return completion

    async def abort(self, rid: str) -> bool:
        """Ask to end a request, which then answers with what it has. True if the server confirmed that it was told."""
        answers = [self._confirms(f"{url}/abort_request", {"rid": rid}) for url in self._abort_urls]
        return all(await asyncio.gather(*answers))

    async def is_healthy(self, timeout_s: float) -> bool:
        """Whether the health check answers within ``timeout_s``."""
        try:
            async with self._client().get(f"{self.url}/health", timeout=_total(timeout_s)) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def get(self, endpoint: str) -> Any:
        """Decoded answer of a GET.

        Raises:
            EngineError: the server did not answer in time, or not with 200 and JSON.
        """
        try:
            async with self._client().get(self.url + endpoint, timeout=_total(self._settings.control_timeout_s)) as got:
                status, text = got.status, await got.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineError(f"{self.url}{endpoint}: {_described(error)}") from error
        content = _json(text)
        if status != 200 or content is None:
            raise EngineError(f"{self.url}{endpoint}: HTTP {status}: {error_message(text, content)}")
        return content

    async def close(self) -> None:
        """Lose what is pending, tell the server, and close the connections."""
        self.mark_down("the client was closed")
        end = time.monotonic() + _CONNECT_S
        while self.load and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _answer(self, request: GenerateRequest, rid: str, session: str) -> tuple[int, str]:
        """(status, text) of the answer, which must come before the deadline and before the server goes down."""
        deadline_s = self._settings.deadline_s(request.sampling.max_new_tokens)
        down = self._down_future()
        sending = asyncio.create_task(self._send(generate_payload(request, rid), session), name=rid)
        try:
            first: set[asyncio.Future[Any]] = {sending, down}
            await asyncio.wait(first, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            sending.cancel()
            self._spawn(self.abort(rid))
            raise
        if not sending.done():
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            if down.done():
                self._spawn(self.abort(rid))
                message = f"{self.url} went down under request {rid!r} ({down.result()})"
                raise RequestLost(message, retry=True, gone=False)
            gone = not await self.abort(rid)
            raise RequestLost(self._late(request, rid, deadline_s), retry=False, gone=gone)
        try:
            return sending.result()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:  # never sent
            raise RequestLost(f"{self.url}: no connection ({_described(error)})", retry=True, gone=True) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            gone = not await self.abort(rid)
            message = f"{self.url}: connection lost under request {rid!r} ({_described(error)})"
            raise RequestLost(message, retry=True, gone=gone) from error

    async def _send(self, payload: dict[str, Any], session: str) -> tuple[int, str]:
        headers = {ROUTING_HEADER: session} if session.isascii() and session.isprintable() else {}
        async with self._client().post(f"{self.url}/generate", json=payload, headers=headers) as response:
            return response.status, await response.text()

    async def _refused(self, rid: str, status: int, message: str) -> None:
        """RequestLost for an answer with an error status."""
        passing = status in _PASSING_STATUS
        # Behind an error of the server or of a router on the way the request may still run.
        gone = passing and not await self.abort(rid)
        raise RequestLost(f"{self.url}/generate: HTTP {status} for {rid!r}: {message}", retry=passing, gone=gone)

    def _late(self, request: GenerateRequest, rid: str, deadline_s: float) -> str:
        settings, tokens = self._settings, request.sampling.max_new_tokens
        return (
            f"{self.url}: request {rid!r} ({len(request.input_ids)} prompt tokens, max_new_tokens={tokens}) did not "
            f"finish within {deadline_s:g} s = sglang.request_timeout_s={settings.request_timeout_s:g} + {tokens} / "
            f"sglang.min_tokens_per_s={settings.min_tokens_per_s:g}"
        )

    def _count(self, completion: Completion) -> None:
        self.stats.num_completed += 1
        self.stats.num_aborted += completion.finish == "abort"
        self.stats.num_prompt_tokens += completion.num_prompt_tokens
        self.stats.num_cached_tokens += completion.num_cached_tokens
        self.stats.num_sampled_tokens += len(completion.output_ids)

    async def _confirms(self, url: str, body: dict[str, Any]) -> bool:
        try:
            async with self._client().post(url, json=body, timeout=_total(_ABORT_S)) as response:
                await response.read()
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    def _client(self) -> aiohttp.ClientSession:
        if self._http is None:
            # No limit of connections: the slots bound the requests, and aborts must never wait behind them.
            # No connection is kept: the server closes them unannounced, after 5 idle seconds and after an error, and a
            # request on one that it is closing would be lost. Beside a generation the handshake is nothing.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
            self._http = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._http

    def _down_future(self) -> asyncio.Future[str]:
        if self._down is None:
            self._down = asyncio.get_running_loop().create_future()
        return self._down

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _total(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, _CONNECT_S))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
