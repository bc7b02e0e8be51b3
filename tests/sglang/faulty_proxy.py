"""A proxy before a real server that answers HTTP 500 and closes, or drops an answer that the server had given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import aiohttp
from aiohttp import web

Fault = Literal["error_500", "drop_after"]


class FaultyProxy:
    """Passes everything on to ``target``; the n-th /generate request meets the n-th of ``faults``, None is none.

    Attributes:
        url: where it listens, within the context.
        num_generations: /generate requests that reached the server.
    """

    def __init__(self, target: str, faults: Sequence[Fault | None]) -> None:
        self._target = target
        self._faults = list(faults)
        self.url = ""
        self.num_generations = 0

    async def __aenter__(self) -> FaultyProxy:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._client = aiohttp.ClientSession()
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()
        await self._runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.Response:
        body, generates = await request.read(), request.path == "/generate"
        fault = self._faults.pop(0) if generates and self._faults else None
        if fault == "error_500":
            return _and_close(web.Response(status=500, text="Internal Server Error"))
        self.num_generations += generates
        headers = {"Content-Type": request.content_type}
        async with self._client.request(
            request.method, f"{self._target}{request.path_qs}", data=body, headers=headers
        ) as answer:
            content = await answer.read()
        if fault == "drop_after":
            assert request.transport is not None
            request.transport.close()
        return web.Response(status=answer.status, body=content, content_type=answer.content_type)


def _and_close(response: web.Response) -> web.Response:
    response.force_close()
    return response
