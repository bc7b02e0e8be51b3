"""The SGLang engine: generates with servers in processes of their own, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.engine import EngineError, GenerateRequest, GenerateResult
from spear_megatron.rollout.sglang.client import RequestLost, ServerClient
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.control import ControlClient, PauseMode
from spear_megatron.rollout.sglang.pool import ServerPool
from spear_megatron.rollout.sglang.protocol import Completion, ProtocolError, make_rid, session_of
from spear_megatron.rollout.sglang.push import checked, push_weights
from spear_megatron.rollout.sglang.servers import check_model, check_server
from spear_megatron.rollout.sglang.stats import EngineStats
from spear_megatron.rollout.validate import check_request

_FIRST_DELAY_S = 0.2
_LONGEST_DELAY_S = 5.0
_ABORT_TRIES = 4
_ABORT_PATIENCE_S = 0.5


@dataclass(slots=True)
class _Active:
    """A request under way: where its current attempt is, and whether somebody asked to end it."""

    client: ServerClient | None = None
    rid: str = ""
    aborted: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)


class SGLangEngine:
    """Requests over one or several servers with the same weights. Implements ``rollout.engine.Engine``.

    A request ends as the embedded engine's does: at its own stop tokens or its own limit, never at an end token of the
    server's. Its tokens are those of one complete answer; an attempt that was lost is aborted and counts for nothing.
    Unlike with the embedded engine, equal requests may give other tokens: only servers in deterministic mode sample by
    ``noise_key``.

    All asynchronous calls come from one loop; ``update_weights`` comes between runs of that loop.

    Args:
        shape: the model, which decides what may be sent: a token outside its vocabulary kills a server.
        settings: deadlines, retries, health.
        servers: their URLs; ``settings.router``, if set, chooses among them for every request.
        max_in_flight: requests of this engine at one server at a time.
        max_model_len: most tokens of prompt and completion together.
        sends_weights: whether ``update_weights`` sends them; of engines that share servers exactly one does, and the
            others wait for its version.

    Raises:
        ValueError: no servers, or sizes that are not positive.
    """

    def __init__(
        self,
        shape: ModelShape,
        settings: SGLangConfig,
        *,
        servers: Sequence[str],
        max_in_flight: int,
        max_model_len: int,
        sends_weights: bool = True,
    ) -> None:
        if not servers or max_model_len < 2:
            raise ValueError(f"servers={tuple(servers)} must name one, and max_model_len={max_model_len} exceed 1")
        self._shape, self._settings, self._max_model_len = shape, settings, max_model_len
        self._sends_weights = sends_weights
        self._servers = tuple(servers)
        self._direct = [self._client(url, max_in_flight) for url in self._servers]
        clients = self._direct
        if settings.router is not None:
            clients = [self._client(settings.router, max_in_flight * len(self._servers), abort_urls=self._servers)]
        self._pool = ServerPool(clients, settings)
        self._stats = EngineStats(clients)
        self._name = os.urandom(4).hex()  # ids must differ between the engines that share a server
        self._numbers = itertools.count()
        self._active: dict[str, _Active] = {}
        self._version: int | None = None
        self._broken: str | None = None
        self._watch: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def version(self) -> int | None:
        """Policy version of the servers' weights, None before the first update and after a failed one."""
        return self._version

    @property
    def stats(self) -> EngineStats:
        """Running counts; a live object."""
        self._stats.num_moved_sessions = self._pool.num_moved_sessions
        return self._stats

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Complete one request. Cancelling the call aborts it at its server.

        Raises:
            ValueError: the request can never be served, or one of its id is under way (names the field).
            EngineError: no server answered, an answer was malformed or without policy version, or the engine is closed.
        """
        check_request(request, vocab_size=self._shape.vocab_size, max_model_len=self._max_model_len)
        if self._closed:
            raise EngineError(f"the engine was closed: request {request.request_id!r} cannot run")
        if self._broken is not None:
            raise EngineError(f"the servers have no complete weights ({self._broken})")
        if request.request_id in self._active:
            raise ValueError(f"request {request.request_id!r}: request_id is that of a request under way")
        active = self._active[request.request_id] = _Active()
        self._stats.num_requests += 1
        try:
            await self._ready()
            return await self._complete(request, active)
        finally:
            del self._active[request.request_id]
            active.over.set()

    async def abort(self, request_ids: Collection[str]) -> None:
        """End requests, which then return what they have with ``finish_reason`` abort; unknown ones are ignored.

        Returns when they ended, or soon after the servers were told: a paused server ends one later.
        """
        await asyncio.gather(*(self._abort(request_id) for request_id in request_ids))

    async def _abort(self, request_id: str) -> None:
        active = self._active.get(request_id)
        if active is None:
            return
        active.aborted = True
        for _ in range(_ABORT_TRIES):  # one that overtakes its request on the way is lost
            if active.client is not None:
                await active.client.abort(active.rid)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ABORT_PATIENCE_S):
                    await active.over.wait()
                return

    async def abort_all(self) -> None:
        """End every request of this engine; those of others at the same servers go on."""
        await self.abort(list(self._active))

    async def pause(self, mode: PauseMode = "retract") -> None:
        """Stop generating on every server: ``abort`` ends the requests of everybody, the others keep them waiting."""
        await self._on_all(lambda control: control.pause(mode))

    async def resume(self) -> None:
        """Generate again after :meth:`pause`."""
        await self._on_all(lambda control: control.resume())

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace every weight on every server (Hugging Face names, full tensors). Running requests wait and go on.

        Engines that share servers must wait for one another before they generate.

        Raises:
            ValueError: a name is missing, unknown or double, or a shape does not fit; names it. The engine then refuses
                to generate until an update succeeds.
            EngineError: the engine was closed, or a server failed.
        """
        if self._closed:
            raise EngineError("the engine was closed: weights cannot be updated")
        self._version, self._broken = None, f"the update to version {version} failed"
        timeout_s = self._settings.control_timeout_s
        controls = [ControlClient(url, timeout_s=timeout_s) for url in self._servers]
        try:
            if self._sends_weights:
                for control in controls:  # before anything is sent: a tensor of another shape kills a server
                    check_model(control.url, control.server_info().model_path, self._shape)
                size = self._settings.max_bucket_mb << 20
                push_weights(
                    controls, named_tensors, self._shape, version, max_bucket_bytes=size, idle_timeout_s=timeout_s
                )
            else:
                for _ in checked(named_tensors, self._shape):
                    pass  # the gather behind the iterator is a collective
        finally:
            for control in controls:
                control.close()
        self.note_version(version)

    def note_version(self, version: int, stale: Mapping[str, str] = MappingProxyType({})) -> None:
        """The servers have the weights of ``version``, sent by somebody else; every token must say its version now.

        ``stale`` names by URL the servers without them, and why: they get no requests until they have them.
        """
        self._version, self._broken = version, None
        self._pool.require_label(str(version))
        self._pool.set_stale(stale)

    async def close(self) -> None:
        """End this engine's requests and connections; the servers go on. Closing twice is harmless."""
        self._closed = True
        tasks = [task for task in (self._watch, self._checking) if task is not None]
        self._watch = self._checking = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in {*self._direct, *self._pool.clients}))

    def _client(self, url: str, max_in_flight: int, abort_urls: Sequence[str] = ()) -> ServerClient:
        return ServerClient(
            url,
            max_in_flight=max_in_flight,
            settings=self._settings,
            vocab_size=self._shape.vocab_size,
            abort_urls=abort_urls,
        )

    async def _ready(self) -> None:
        """Check every server before the first request, once; watch their health from then on."""
        if self._checking is None:
            self._checking = asyncio.create_task(self._check_servers(), name="sglang-check")
        checking = self._checking
        try:
            await asyncio.shield(checking)
        except (EngineError, ValueError):
            if self._checking is checking:
                self._checking = None  # the next request asks again
            raise
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._pool.watch(), name="sglang-health")

    async def _check_servers(self) -> None:
        checks = (check_server(client, self._shape, self._max_model_len) for client in self._direct)
        found = await asyncio.gather(*checks, return_exceptions=True)
        failed = {client: error for client, error in zip(self._direct, found, strict=True) if error is not None}
        for error in failed.values():
            if not isinstance(error, EngineError) or len(failed) == len(self._direct):
                raise error
        for client, error in failed.items():
            client.mark_down(str(error))  # its health check brings it back

    async def _complete(self, request: GenerateRequest, active: _Active) -> GenerateResult:
        """The request's tokens, over as many answers as the server's own end tokens split it into."""
        sampling, stops = request.sampling, set(request.sampling.stop_token_ids)
        ids: tuple[int, ...] = ()
        log_probs: tuple[float, ...] = ()
        versions: tuple[int, ...] = ()
        while True:
            rest = replace(
                request,
                input_ids=request.input_ids + ids,
                sampling=replace(sampling, max_new_tokens=sampling.max_new_tokens - len(ids)),
            )
            part = await self._with_retries(rest, active)
            ids, log_probs = ids + part.output_ids, log_probs + part.log_probs
            versions += part.policy_versions
            finish = part.finish
            if finish != "stop" or ids[-1] in stops:
                break
            # An end token of the server's that this request does not stop at.
            if len(ids) == sampling.max_new_tokens:
                finish = "length"
                break
        if len(versions) != len(ids):
            versions = ()
        return GenerateResult(output_ids=ids, log_probs=log_probs, finish_reason=finish, policy_versions=versions)

    def _require_versions(self, part: Completion, client: ServerClient, rid: str) -> None:
        if self._version is not None and len(part.policy_versions) != len(part.output_ids):
            reason = (
                f"{client.url}: request {rid!r} has tokens of unnumbered weights, while version {self._version} was "
                "sent to every server: it was restarted without them"
            )
            if self._settings.router is not None:  # which of the servers behind it, nobody knows
                raise EngineError(reason)
            client.mark_down(reason)  # it comes back once it names the version
            raise RequestLost(reason, retry=True, gone=False)

    async def _with_retries(self, request: GenerateRequest, active: _Active) -> Completion:
        session = session_of(request.request_id)
        delay_s, lost = _FIRST_DELAY_S, ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                self._stats.num_retries += 1
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            client = await self._pool.choose(session)
            try:
                async with client.slot():
                    if active.aborted:
                        return Completion((), (), "abort", (), 0, 0, "aborted before it was sent")
                    active.client, active.rid = client, make_rid(self._name, session, next(self._numbers))
                    part = await client.generate(request, rid=active.rid, session=session)
                    self._require_versions(part, client, active.rid)
                    return part
            except RequestLost as error:
                if error.gone:
                    await self._pool.suspect(client)
                if not error.retry or self._closed:
                    raise
                lost = str(error)
            except ProtocolError:
                await self._pool.suspect(client)
                raise
        raise EngineError(f"{request.request_id!r}: {self._settings.retries + 1} attempts were lost, the last: {lost}")

    async def _on_all(self, call: Callable[[ControlClient], None]) -> None:
        def on_one(url: str) -> None:
            control = ControlClient(url, timeout_s=self._settings.control_timeout_s)
            try:
                call(control)
            finally:
                control.close()

        await asyncio.gather(*(asyncio.to_thread(on_one, url) for url in self._servers))
