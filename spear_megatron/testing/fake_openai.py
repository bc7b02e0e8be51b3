"""A server that speaks OpenAI's completions API without a model: its answers are a function, it fails when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

from aiohttp import web

Fault = Literal["error_500", "rate_limited", "drop", "hang", "filtered", "other_prompt", "no_choice"]
"""What goes wrong with one request.

error_500; rate_limited: 429 with Retry-After; drop: the connection breaks; hang: no answer; filtered: another finish
reason; other_prompt: says that it read one token more than were sent; no_choice: an answer without one.
"""

EXTENSIONS = frozenset("return_token_ids skip_special_tokens stop_token_ids top_k".split())


class FakeOpenAI:
    """The server; use as ``async with FakeOpenAI(...) as server``, in a loop that runs while it is asked.

    Args:
        reply: token ids that the model gives after (prompt ids, seed), the end token included.
        decode: text of token ids.
        model: name it serves.
        extended: whether it knows the keys of vLLM and SGLang; OpenAI refuses them.
        max_model_len: what it says that a request may have.
        api_key: refuses requests without it.
        faults: what goes wrong with the first completions, in order of arrival; None for nothing.

    Attributes:
        received: bodies of all completions, refused ones included.
        peak: most requests at a time.
    """

    def __init__(
        self,
        reply: Callable[[tuple[int, ...], int], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        *,
        model: str = "fake",
        extended: bool = True,
        max_model_len: int | None = None,
        api_key: str | None = None,
        faults: Sequence[Fault | None] = (),
    ) -> None:
        self.reply, self.decode, self.model, self.extended = reply, decode, model, extended
        self.max_model_len, self.api_key, self.faults = max_model_len, api_key, list(faults)
        self.received: list[dict[str, Any]] = []
        self.peak = self._running = self._port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> FakeOpenAI:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        row = {"id": self.model, "object": "model"}
        if self.max_model_len is not None:
            row |= {"max_model_len": self.max_model_len}  # type: ignore[dict-item]
        return web.json_response({"object": "list", "data": [row]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.received.append(body)
        if (refusal := self._refusal(request)) is not None:
            return refusal
        if body["model"] != self.model:
            return _error(404, f"The model `{body['model']}` does not exist.")
        unknown = sorted(EXTENSIONS & body.keys())
        if unknown and not self.extended:
            return _error(400, f"Unrecognized request argument supplied: {unknown[0]}")
        self._running += 1
        self.peak = max(self.peak, self._running)
        try:
            return await self._answer(request, body, self.faults.pop(0) if self.faults else None)
        finally:
            self._running -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any], fault: Fault | None) -> web.StreamResponse:
        await asyncio.sleep(0.005)
        if fault == "error_500":
            return _error(500, "out of luck")
        if fault == "rate_limited":
            return _error(429, "too many requests", {"Retry-After": "0.01"})
        if fault == "hang":
            await asyncio.sleep(60.0)
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError("broken on purpose")
        prompt = tuple(body["prompt"])
        ids, stop = self._sampled(prompt, body)
        shown = ids[:-1] if stop is not None else ids
        choice: dict[str, Any] = {"index": 0, "text": self.decode(shown), "logprobs": None}
        choice["finish_reason"] = "content_filter" if fault == "filtered" else "length" if stop is None else "stop"
        choice["stop_reason"] = stop
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
        usage = {"prompt_tokens": len(prompt) + (fault == "other_prompt"), "completion_tokens": len(ids)}
        choices = [] if fault == "no_choice" else [choice]
        return web.json_response({"id": "cmpl-1", "object": "text_completion", "choices": choices, "usage": usage})

    def _sampled(self, prompt: tuple[int, ...], body: dict[str, Any]) -> tuple[list[int], int | None]:
        """The reply up to its limit or first stop, and what it stopped at."""
        stops, texts = set(body.get("stop_token_ids", ())), set(body.get("stop", ()))
        ids: list[int] = []
        for token in self.reply(prompt, body["seed"]):
            if len(ids) == body["max_tokens"]:
                return ids, None
            ids.append(token)
            if token in stops or self.decode([token]) in texts:
                return ids, token
        return ids, None

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return _error(401, "Incorrect API key provided.")
        return None


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)
