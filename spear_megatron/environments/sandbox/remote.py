"""Client of a SandboxFusion service (``POST /run_code``), for clusters that keep code execution on other machines.

The service isolates programs and has limits of its own for processes and disk; wall time and memory are passed on.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from spear_megatron.environments.sandbox.config import SandboxConfig
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus, infrastructure

if TYPE_CHECKING:
    import httpx

_RETRIED_STATUS = frozenset({502, 503, 504})
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_GRACE_S = 10.0
_CONNECT_S = 5.0
_HEADERS = {"Content-Type": "application/json"}
_SIGKILL_CODES = (-9, 137)


class _Unusable(Exception):
    """One attempt failed; ``retry`` says whether another one may work."""

    def __init__(self, detail: str, retry: bool) -> None:
        super().__init__(detail)
        self.retry = retry


class _TooLarge(Exception):
    """The answer is longer than any answer within the output limit can be."""


class RemoteSandbox:
    """Implements ``Sandbox`` over HTTP. At most ``workers`` requests are open at a time."""

    def __init__(self, config: SandboxConfig) -> None:
        self.num_retries = 0
        self._config = config
        self._url = f"{(config.url or '').rstrip('/')}/run_code"
        self._max_body_bytes = 2 * 6 * config.output_bytes + (1 << 16)  # JSON escapes a byte with up to 6
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turns = asyncio.Semaphore(config.workers)
        self._closed = False

    async def run(self, code: str) -> ExecutionResult:
        """See ``Sandbox.run``. One run takes at most ``wall_s`` + 10 s, attempts and pauses together."""
        if self._closed:
            return infrastructure("the sandbox was closed")
        client, turns = self._on_this_loop()
        try:
            async with asyncio.timeout(self._config.queue_s):
                await turns.acquire()
        except TimeoutError:
            return infrastructure(f"waited {self._config.queue_s:g} s for one of {self._config.workers} workers")
        limit_s = self._config.wall_s + _GRACE_S
        try:
            async with asyncio.timeout(limit_s):
                return await self._attempts(client, code)
        except TimeoutError:
            return infrastructure(f"{self._url} did not answer within {limit_s:g} s")
        finally:
            turns.release()

    def _on_this_loop(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        import httpx

        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            limits = httpx.Limits(max_connections=self._config.workers)
            timeout = httpx.Timeout(self._config.wall_s + _GRACE_S, connect=_CONNECT_S)
            self._client = httpx.AsyncClient(limits=limits, timeout=timeout)
            self._turns = asyncio.Semaphore(self._config.workers)
            self._loop = loop
        return self._client, self._turns

    async def _attempts(self, client: httpx.AsyncClient, code: str) -> ExecutionResult:
        pause_s = _FIRST_PAUSE_S
        for attempt in range(self._config.remote_retries + 1):
            started = time.monotonic()
            try:
                answer = await self._post(client, code)
                return _to_result(answer, time.monotonic() - started, self._config)
            except _TooLarge:
                detail = f"wrote more than {self._config.output_bytes} bytes"
                return ExecutionResult(
                    status=ExecutionStatus.OUTPUT_LIMIT,
                    duration_s=time.monotonic() - started,
                    stdout_truncated=True,
                    stderr_truncated=True,
                    detail=detail,
                )
            except _Unusable as error:
                if not error.retry or attempt == self._config.remote_retries:
                    return infrastructure(f"{error} ({attempt + 1} attempts)")
            self.num_retries += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise AssertionError("the last attempt returns")

    async def _post(self, client: httpx.AsyncClient, code: str) -> dict[str, Any]:
        import httpx

        request = {
            "code": code,
            "language": "python",
            "compile_timeout": self._config.wall_s,
            "run_timeout": self._config.wall_s,
            "memory_limit_MB": self._config.memory_mb,
        }
        body = bytearray()
        try:
            # json.dumps escapes what model text may hold and UTF-8 cannot (lone surrogates).
            async with client.stream("POST", self._url, content=json.dumps(request), headers=_HEADERS) as response:
                if response.status_code != httpx.codes.OK:
                    detail = f"{self._url} answered with HTTP status {response.status_code}"
                    raise _Unusable(detail, response.status_code in _RETRIED_STATUS)
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > self._max_body_bytes:
                        raise _TooLarge
        except httpx.TimeoutException as error:
            retry = isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout)
            raise _Unusable(f"{self._url}: {type(error).__name__}", retry) from error
        except httpx.TransportError as error:
            raise _Unusable(f"{self._url}: {type(error).__name__}: {error}", True) from error
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise _Unusable(f"{self._url} answered with something other than JSON", False) from error
        if not isinstance(answer, dict):
            raise _Unusable(f"{self._url} answered with JSON that is not an object", False)
        return answer

    async def close(self) -> None:
        """See ``Sandbox.close``."""
        self._closed = True
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()


def _cut(text: object, limit: int) -> tuple[str, bool]:
    """Text within ``limit`` bytes of UTF-8, and whether something was cut off."""
    data = (text if isinstance(text, str) else "").encode("utf-8", "replace")
    return data[:limit].decode("utf-8", "ignore"), len(data) > limit


def _to_result(answer: dict[str, Any], duration_s: float, config: SandboxConfig) -> ExecutionResult:
    """Translate a ``RunCodeResponse``.

    Raises:
        _Unusable: the service itself failed, or its answer does not follow its schema.
    """
    run = answer.get("run_result")
    if answer.get("status") == "SandboxError":
        raise _Unusable(f"the service failed: {answer.get('message') or 'no message'}", False)
    if not isinstance(run, dict):
        raise _Unusable(f"the service reported no run: {answer.get('message') or answer.get('status')!r}", False)
    stdout, stdout_truncated = _cut(run.get("stdout"), config.output_bytes)
    stderr, stderr_truncated = _cut(run.get("stderr"), config.output_bytes)
    code, detail = run.get("return_code"), ""
    if run.get("status") == "TimeLimitExceeded":
        status, detail = ExecutionStatus.TIMEOUT, f"ran longer than {config.wall_s:g} s"
    elif stdout_truncated or stderr_truncated:
        status, detail = ExecutionStatus.OUTPUT_LIMIT, f"wrote more than {config.output_bytes} bytes"
    elif run.get("status") != "Finished" or not isinstance(code, int):
        raise _Unusable(f"the service could not run the program: {run.get('status')!r}", False)
    elif code == 0:
        status = ExecutionStatus.OK
    elif code in _SIGKILL_CODES:
        status, detail = ExecutionStatus.KILLED, "killed by signal 9 (SIGKILL)"
    elif stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        status, detail = ExecutionStatus.MEMORY, f"needed more than {config.memory_mb} MiB"
    else:
        status = ExecutionStatus.ERROR
    seconds = run.get("execution_time")
    return ExecutionResult(
        status=status,
        stdout=stdout,
        stderr=stderr,
        duration_s=float(seconds) if isinstance(seconds, int | float) else duration_s,
        stdout_truncated=stdout_truncated,
        stderr_truncated=stderr_truncated,
        detail=detail,
    )
