"""The client of a SandboxFusion service, against a small HTTP server that speaks its schema."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from spear_megatron.environments.sandbox import ExecutionResult, ExecutionStatus, SandboxConfig, open_sandbox
from spear_megatron.environments.sandbox.remote import RemoteSandbox

Reply = tuple[int, bytes]


def finished(stdout: str = "", stderr: str = "", code: int = 0, status: str = "Finished") -> Reply:
    """The answer of the service to a program that ran."""
    run = {"status": status, "execution_time": 0.25, "return_code": code, "stdout": stdout, "stderr": stderr}
    outcome = "Success" if code == 0 and status == "Finished" else "Failed"
    answer = {"status": outcome, "message": "", "compile_result": None, "run_result": run, "executor_pod_name": None}
    return 200, json.dumps({**answer, "files": {}}).encode()


class Service:
    """Answers every request with ``reply(request number, request)``."""

    def __init__(self) -> None:
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda number, request: finished()
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                assert self.path == "/run_code" and self.headers["Content-Type"] == "application/json"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with service.lock:
                    service.requests.append(request)
                    number = len(service.requests)
                status, body = service.reply(number, request)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True  # the client had enough

            def log_message(self, *arguments: object) -> None:
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def run(self, code: str = "print(1)", **config: Any) -> ExecutionResult:
        """Run one program with a client of its own."""
        return run_all(self.url, [code], **config)[0]


def run_all(url: str, codes: list[str], **config: Any) -> list[ExecutionResult]:
    """Run programs concurrently with one client."""

    async def main() -> list[ExecutionResult]:
        sandbox = open_sandbox(SandboxConfig(backend="remote", url=url, **config))
        try:
            return await asyncio.gather(*(sandbox.run(code) for code in codes))
        finally:
            await sandbox.close()

    return asyncio.run(main())


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr("spear_megatron.environments.sandbox.remote._FIRST_PAUSE_S", 0.01)
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (finished("1\n"), ExecutionStatus.OK),
        (finished(stderr="Traceback\nValueError: x\n", code=1), ExecutionStatus.ERROR),
        (finished(stderr="Traceback\nMemoryError\n", code=1), ExecutionStatus.MEMORY),
        (finished(code=-9), ExecutionStatus.KILLED),
        (finished("part", status="TimeLimitExceeded", code=1), ExecutionStatus.TIMEOUT),
        (finished(status="Error", code=1), ExecutionStatus.INFRASTRUCTURE),
        ((200, b'{"status": "SandboxError", "message": "no pod", "run_result": null}'), ExecutionStatus.INFRASTRUCTURE),
        ((200, b'{"status": "Success"}'), ExecutionStatus.INFRASTRUCTURE),
        ((200, b"<html>"), ExecutionStatus.INFRASTRUCTURE),
        ((200, b"[]"), ExecutionStatus.INFRASTRUCTURE),
        ((422, b"{}"), ExecutionStatus.INFRASTRUCTURE),
    ],
)
def test_answers(service: Service, reply: Reply, status: ExecutionStatus) -> None:
    service.reply = lambda number, request: reply
    result = service.run()
    assert result.status is status, result
    assert len(service.requests) == 1
    assert (result.detail != "") == (status not in (ExecutionStatus.OK, ExecutionStatus.ERROR))


def test_request(service: Service) -> None:
    service.reply = lambda number, request: finished(request["code"])
    result = service.run("print('\ud800\u00e9')", wall_s=7.0, memory_mb=123)
    request = service.requests[0]
    assert request["language"] == "python" and request["run_timeout"] == 7.0 and request["memory_limit_MB"] == 123
    assert request["code"] == "print('\ud800\u00e9')"
    assert result.status is ExecutionStatus.OK and result.duration_s == 0.25


@pytest.mark.parametrize("status", [502, 503, 504])
def test_retries_until_it_works(service: Service, status: int) -> None:
    service.reply = lambda number, request: finished("1\n") if number == 3 else (status, b"busy")
    assert service.run().stdout == "1\n"
    assert len(service.requests) == 3


def test_retries_are_bounded(service: Service) -> None:
    service.reply = lambda number, request: (504, b"")
    result = service.run(remote_retries=2)
    assert result.status is ExecutionStatus.INFRASTRUCTURE and "504" in result.detail and "3 attempts" in result.detail
    assert len(service.requests) == 3


def test_nobody_listens(service: Service) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    result = run_all(f"http://127.0.0.1:{port}", ["print(1)"], remote_retries=1)[0]
    assert result.status is ExecutionStatus.INFRASTRUCTURE and "2 attempts" in result.detail


def test_service_that_never_answers(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear_megatron.environments.sandbox.remote._GRACE_S", 0.2)
    release = threading.Event()
    service.reply = lambda number, request: (release.wait(20), finished())[1]
    started = time.monotonic()
    result = service.run(wall_s=0.3, cpu_s=0.1)
    assert result.status is ExecutionStatus.INFRASTRUCTURE, result
    assert time.monotonic() - started < 5
    release.set()


@pytest.mark.parametrize("size", [200, 10_000_000])
def test_output_limit(service: Service, size: int) -> None:
    service.reply = lambda number, request: finished("x" * size)
    result = service.run(output_bytes=100)
    assert result.status is ExecutionStatus.OUTPUT_LIMIT and result.stdout_truncated
    assert len(result.stdout) <= 100


def test_no_more_requests_than_workers(service: Service) -> None:
    active, most = 0, 0

    def reply(number: int, request: dict[str, Any]) -> Reply:
        nonlocal active, most
        with service.lock:
            active += 1
            most = max(most, active)
        time.sleep(0.05)
        with service.lock:
            active -= 1
        return finished(request["code"])

    service.reply = reply
    codes = [str(number) for number in range(12)]
    assert [result.stdout for result in run_all(service.url, codes, workers=3)] == codes
    assert most == 3


def test_closed_client(service: Service) -> None:
    async def main() -> ExecutionResult:
        sandbox = RemoteSandbox(SandboxConfig(backend="remote", url=service.url))
        await sandbox.close()
        return await sandbox.run("print(1)")

    assert asyncio.run(main()).status is ExecutionStatus.INFRASTRUCTURE
    assert service.requests == []
