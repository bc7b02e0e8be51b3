"""``evaluate`` with SGLang servers that hold the model already, that hold another, and behind a router."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from spear_megatron.__main__ import main
from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.loop_thread import LoopThread
from spear_megatron.testing.fake_sglang import FakeSGLang

SIZES = (
    "data.generator.num_val=3", "data.generator.levels=[1]", "data.max_prompt_length=256",
    "data.max_response_length=16", "env.sandbox.preload=[]", "trainer.num_threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("servers") / "model"
    make_tiny_model(folder, seed=0)
    return folder


@contextlib.contextmanager
def listening(*servers: Any) -> Iterator[None]:
    """Servers on a thread of their own, as the command has the main one."""
    loop = LoopThread("fake-servers")
    try:
        for server in servers:
            loop.run(server.start(), 10.0)
        yield
        for server in servers:
            loop.run(server.stop(), 10.0)
    finally:
        loop.close()


class Router:
    """Passes on what SGLang's routers do: generation and questions, but nothing that changes a server."""

    def __init__(self, server: FakeSGLang) -> None:
        self._server, self.passed, self.url = server, 0, ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._pass)
        for endpoint in ("get_server_info", "get_model_info", "v1/models", "health"):
            app.router.add_get(f"/{endpoint}", self._pass)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]

    async def _pass(self, request: web.Request) -> web.Response:
        self.passed += request.path == "/generate"
        async with aiohttp.ClientSession() as session:
            body = await request.read()
            async with session.request(request.method, self._server.url + request.path, data=body) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type="application/json")

    async def stop(self) -> None:
        await self._runner.cleanup()


def server_of(model: Path, **options: Any) -> FakeSGLang:
    shape = ModelShape.from_folder(model)
    settings = {"model_path": str(model), "vocab_size": shape.vocab_size, "context_length": 2048}
    return FakeSGLang(**{**settings, **options})


def evaluate(model: Path, out: Path, *options: str) -> int:
    command = ["evaluate", "--model", str(model), "--out", str(out), "--n", "1", "--engine", "sglang"]
    return main([*command, *options, *SIZES])


def test_weights_are_sent_only_to_a_server_that_has_others(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    holder, trained = server_of(model, model_path=str(copy)), server_of(model, weight_version="40")
    with listening(holder, trained):
        assert evaluate(model, tmp_path / "holder", "--server", holder.url) == 0
        assert "no weights are sent" in capsys.readouterr().out and holder.updates == []
        assert evaluate(model, tmp_path / "trained", "--server", f"{trained.url}/") == 0
        assert trained.updates and trained.weight_version == "0"
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("holder", "trained")]
    assert reports[0] == reports[1] and reports[0]["num_samples"] == 3


def test_a_router_is_asked_where_its_servers_hold_the_model(model: Path, tmp_path: Path) -> None:
    server = server_of(model)
    router = Router(server)
    with listening(server, router):
        assert evaluate(model, tmp_path, "--server", router.url) == 0
        assert router.passed == len(server.received) >= 3 and server.updates == []


def test_the_name_of_what_is_served_elsewhere_is_checked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = server_of(model, model_path="Qwen/Qwen3-32B")
    with listening(server):
        assert evaluate(model, tmp_path / "a", "--server", server.url, "--served-model", "Qwen/Qwen3-32B") == 0
        assert server.updates == []
        assert evaluate(model, tmp_path / "b", "--server", server.url, "--served-model", "Qwen/Qwen2.5-32B") == 2
        assert "has the model Qwen/Qwen3-32B" in capsys.readouterr().err
        assert server.updates == []
