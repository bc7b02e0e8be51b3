"""A server that speaks SGLang's HTTP without a model: its sampler is arithmetic, and it fails when told to.

It treats bad requests as the real one does (SGLang 0.5.21): some are refused, and some kill it. Tests that count what
was sampled twice, lost or aborted read its counters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from aiohttp import web

Fault = Literal["error_500", "unavailable", "hang", "drop_before", "drop_after", "drop_inside", "wrong_count", "abort"]
"""What goes wrong with one request.

error_500: answers 500 and closes the connection; unavailable: 503; hang: generates nothing until aborted; drop_before,
drop_after: the connection breaks before, or after, the tokens were sampled; drop_inside: in the middle of the answer;
wrong_count: one log-prob is missing; abort: the server aborts it by itself.
"""

KNOWN_PARAMS = frozenset(
    "max_new_tokens temperature top_p top_k stop_token_ids ignore_eos min_p frequency_penalty presence_penalty "
    "repetition_penalty min_new_tokens n stop skip_special_tokens sampling_seed".split()
)


def next_token(ids: Sequence[int], vocab_size: int) -> int:
    """The token that the fake model gives after ``ids``."""
    return (7 * ids[-1] + 3 * len(ids) + sum(ids) + 1) % vocab_size


def log_prob_of(token: int) -> float:
    """Its log-prob."""
    return -0.25 * (1 + token % 7)


class FakeSGLang:
    """The server; use as ``async with FakeSGLang() as server``, in the loop of the test.

    Args:
        vocab_size, context_length, eos_token_id: of the model it pretends to have.
        seconds_per_token: time that a token takes.
        version: of SGLang; without spans of weight versions before 0.5.20, without update sessions before 0.5.21.
        faults: what goes wrong with the first requests, in order of arrival; None for nothing.
        host, port: where it listens; port 0 takes a free one.
        model_path: what it says that it was started with.

    Attributes:
        received: (rid, input ids) of every /generate, refused ones included.
        answered: rids whose whole answer was handed to the connection.
        sampled: rid -> tokens sampled so far.
        aborted: rids named by /abort_request.
        routing_keys: routing header of every /generate.
        updates: names of the tensors of every weight update.
        events: endpoints of control requests in order.
        peak: most requests at a time.
        healthy, health_delay_s, num_health_checks: the health check's answer, what it takes, and how often it came.
        control_delay_s, arrival_delay_s: what /get_server_info takes, and a /generate until an abort can find it.
        dead: what killed the server, or None.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 320,
        context_length: int = 512,
        eos_token_id: int | None = None,
        seconds_per_token: float = 0.0,
        version: str = "0.5.21",
        weight_version: str = "default",
        faults: Sequence[Fault | None] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        model_path: str = "fake",
    ) -> None:
        self._host, self._port, self._model_path = host, port, model_path
        self.vocab_size, self.context_length, self.eos_token_id = vocab_size, context_length, eos_token_id
        self.seconds_per_token, self.version, self.weight_version = seconds_per_token, version, weight_version
        self.faults = list(faults)
        self.healthy = True
        self.health_delay_s = 0.0
        self.control_delay_s = 0.0
        self.arrival_delay_s = 0.0
        self.num_health_checks = 0
        self.received: list[tuple[str, tuple[int, ...]]] = []
        self.answered: list[str] = []
        self.sampled: dict[str, int] = {}
        self.aborted: list[str] = []
        self.routing_keys: list[str | None] = []
        self.updates: list[list[str]] = []
        self.events: list[str] = []
        self.peak = 0
        self.dead: str | None = None
        self._running: dict[str, asyncio.Event] = {}
        self._seen: set[tuple[int, ...]] = set()
        self._unpaused = asyncio.Event()
        self._unpaused.set()
        self._session = False
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._host}:{self._port}"

    async def __aenter__(self) -> FakeSGLang:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen: on a free port at first, on the same one after :meth:`stop`."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/health", self._health)
        app.router.add_get("/get_server_info", self._server_info)
        app.router.add_get("/get_model_info", self._model_info)
        app.router.add_get("/v1/models", self._models)
        for endpoint in ("pause_generation", "continue_generation", "begin_weight_update", "end_weight_update"):
            app.router.add_post(f"/{endpoint}", self._control)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_post("/update_weights_from_tensor", self._update)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, reuse_address=True)
        await site.start()
        assert site._server is not None
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.dead = None

    async def stop(self) -> None:
        """Break every connection and refuse new ones, as a killed process does."""
        runner, self._runner = self._runner, None
        if runner is not None:
            assert runner.server is not None
            for connection in list(runner.server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        payload = await request.json()
        rid, ids, params = payload["rid"], payload["input_ids"], payload["sampling_params"]
        self.received.append((rid, tuple(ids)))
        self.routing_keys.append(request.headers.get("X-SMG-Routing-Key"))
        refusal = await self._refusal(request, rid, ids, params)
        if refusal is not None:
            return refusal
        await asyncio.sleep(self.arrival_delay_s)
        fault = self.faults.pop(0) if self.faults else None
        if fault == "error_500":
            return _failure(request)
        if fault == "unavailable":
            return web.json_response({"detail": "The request queue is full."}, status=503)
        if fault == "drop_before":
            _break(request)
        ended = self._running[rid] = asyncio.Event()
        self.peak = max(self.peak, len(self._running))
        try:
            answer = await self._run(rid, tuple(ids), params, fault, ended)
        finally:
            self._running.pop(rid, None)
        return await self._reply(request, rid, answer, fault)

    async def _refusal(
        self, request: web.Request, rid: str, ids: list[int], params: dict[str, Any]
    ) -> web.StreamResponse | None:
        """What the real server does with a request that it cannot serve: 400, 500, or death."""
        if set(params) - KNOWN_PARAMS:
            return _failure(request)
        total = len(ids) + params["max_new_tokens"]
        reason = None
        if not ids:
            reason = "input_ids cannot be empty."
        elif params["temperature"] < 0:
            reason = f"temperature must be non-negative, got {params['temperature']}."
        elif rid in self._running:
            reason = f"Duplicate request ID detected: {rid}"
        elif total > self.context_length:
            reason = f"Requested token count exceeds the model's context length of {self.context_length} tokens."
        if reason is not None:
            return web.json_response({"error": {"message": reason}}, status=400)
        if not all(0 <= token < self.vocab_size for token in ids):
            await self._die(f"token outside the vocabulary in {rid}", request)
        return None

    async def _run(
        self, rid: str, prompt: tuple[int, ...], params: dict[str, Any], fault: Fault | None, ended: asyncio.Event
    ) -> dict[str, Any]:
        if fault == "hang":
            await ended.wait()
        ids, start = list(prompt), self.weight_version
        spans = [{"version": start, "start": 0, "end": 0}]
        stops = set() if params.get("ignore_eos") else {*params.get("stop_token_ids", ()), self.eos_token_id}
        limit = params["max_new_tokens"]
        reason: dict[str, Any] = {"type": "length", "length": limit}
        cached = self._cached(prompt)
        while len(ids) - len(prompt) < limit:
            await asyncio.sleep(self.seconds_per_token)
            while not (self._unpaused.is_set() or ended.is_set()):
                await asyncio.sleep(0.002)
            if ended.is_set() or (fault == "abort" and len(ids) > len(prompt)):
                reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
                break
            count = len(ids) - len(prompt)
            if self.weight_version != spans[-1]["version"]:
                spans.append({"version": self.weight_version, "start": count, "end": count})
            ids.append(next_token(ids, self.vocab_size))
            spans[-1]["end"] = count + 1
            self.sampled[rid] = count + 1
            if ids[-1] in stops:
                reason = {"type": "stop", "matched": ids[-1]}
                break
        self._seen.add(tuple(ids))
        return self._answer(rid, prompt, ids[len(prompt) :], reason, [span for span in spans if span["end"]], cached)

    def _answer(
        self,
        rid: str,
        prompt: tuple[int, ...],
        output: list[int],
        reason: dict[str, Any],
        spans: list[dict[str, Any]],
        cached: int,
    ) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": reason,
            "prompt_tokens": len(prompt),
            "weight_version": self.weight_version,
            "input_token_logprobs": [],
            "output_token_logprobs": [[log_prob_of(token), token, None] for token in output],
            "output_token_logprobs_length": len(output),
            "completion_tokens": len(output),
            "cached_tokens": cached,
        }
        if self._is_at_least(20):
            meta["weight_versions"] = spans
        return {"text": "..", "output_ids": output, "meta_info": meta}

    async def _reply(
        self, request: web.Request, rid: str, answer: dict[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        if fault == "drop_after":
            _break(request)
        if fault == "wrong_count":
            answer["meta_info"]["output_token_logprobs"].pop()
        if fault == "drop_inside":
            response = web.StreamResponse(headers={"Content-Length": "100000"})
            await response.prepare(request)
            await response.write(b'{"text":')
            _break(request)
        self.answered.append(rid)
        return web.json_response(answer)

    def _cached(self, prompt: tuple[int, ...]) -> int:
        """Longest beginning of the prompt, without its last token, that an earlier sequence had."""
        longest = 0
        for seen in self._seen:
            both = min(len(seen), len(prompt))
            longest = max(longest, next((i for i in range(both) if seen[i] != prompt[i]), both))
        return min(longest, len(prompt) - 1)

    async def _abort(self, request: web.Request) -> web.Response:
        """Ends every request whose id begins with the given one, as the real scheduler does."""
        body = await request.json()
        if body.get("rid"):
            self.aborted.append(body["rid"])
        for rid, ended in self._running.items():
            if body.get("abort_all") or (body.get("rid") and rid.startswith(body["rid"])):
                ended.set()
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        self.num_health_checks += 1
        await asyncio.sleep(self.health_delay_s)
        return web.Response(status=200 if self.healthy else 503)

    async def _server_info(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.control_delay_s)
        facts = {"version": self.version, "max_total_num_tokens": 16384, "context_length": None, "tp_size": 1}
        return web.json_response(facts)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": self._model_path, "weight_version": self.weight_version})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": self.context_length}]})

    async def _control(self, request: web.Request) -> web.Response:
        """Pauses, and the sessions of weight updates."""
        endpoint = request.path.strip("/")
        body = await request.json()
        self.events.append(endpoint)
        if endpoint == "pause_generation":
            self._unpaused.clear()
            if body.get("mode", "abort") == "abort":
                for ended in self._running.values():
                    ended.set()
        elif endpoint == "continue_generation":
            self._unpaused.set()
        elif not self._is_at_least(21):
            return web.json_response({"detail": "Not Found"}, status=404)
        elif self._session == (endpoint == "begin_weight_update"):
            state = "a" if self._session else "no"
            text = f"{state} weight-update session is {'already ' if self._session else ''}open"
            return web.json_response({"success": False, "message": text}, status=400)
        else:
            self._session = not self._session
        return web.json_response({"message": "ok", "status": "ok"})

    async def _flush(self, request: web.Request) -> web.Response:
        self.events.append("flush_cache")
        if self._running and (self._unpaused.is_set() or float(request.query.get("timeout", 0)) > 0):
            return web.Response(status=400, text="Flush cache failed.")
        self._seen.clear()
        return web.Response(text="Cache flushed.")

    async def _update(self, request: web.Request) -> web.StreamResponse:
        from spear_megatron.testing.payloads import read_payload  # torch: many stand-ins never get weights

        body = await request.json()
        self.events.append("update_weights_from_tensor")
        if self._is_at_least(21) and not self._session:
            text = "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
            return web.json_response({"success": False, "message": text}, status=400)
        if body.get("flush_cache", True) and self._running:
            await self._die("cache flush under running requests", request)
        self.updates += [list(read_payload(text)[0]) for text in body["serialized_named_tensors"]]
        if body.get("weight_version") is not None:
            self.weight_version = body["weight_version"]
        return web.json_response({"success": True, "message": "Success"})

    async def _die(self, reason: str, request: web.Request) -> None:
        self.dead = reason
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self.stop()))
        _break(request)

    def _is_at_least(self, patch: int) -> bool:
        return int(self.version.split(".")[2]) >= patch


def _failure(request: web.Request) -> web.Response:
    """An answer of status 500, after which the connection closes without having said so."""
    if request.transport is not None:
        asyncio.get_running_loop().call_later(0.02, request.transport.abort)
    return web.Response(status=500, text="Internal Server Error")


def _break(request: web.Request) -> None:
    """Break the connection under a request. Raises ConnectionResetError to leave the handler."""
    if request.transport is not None:
        request.transport.abort()
    raise ConnectionResetError("broken on purpose")
