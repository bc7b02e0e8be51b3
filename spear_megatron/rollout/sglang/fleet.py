"""The servers that one rank started: who serves, who needs weights, what was lost. Used by engine and publisher."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.member import Endpoint, Member, Published, Restore, State
from spear_megatron.rollout.sglang.process import Launch

_LOG = logging.getLogger(__name__)
_POLL_S = 0.05
_MARGIN_S = 1.0  # for members to say why they are not ready
_END_S = 60.0
_SETTLED = (State.SERVING, State.FAILED, State.STOPPED)


class Fleet:
    """Starts, watches, replaces and ends servers. Every method may be called from any thread.

    Requests go to :meth:`serving`; new weights to :meth:`reachable`, and then :meth:`published` says who took them. A
    server that was replaced in between is stale and not served from until it has them too: from ``restore`` where the
    publisher gave one, else with the next publication.

    Args:
        launches: how each server is started, one per member.
        config: deadlines, patience and limits.
    """

    def __init__(self, launches: Sequence[Launch], config: SGLangLaunchConfig) -> None:
        if not launches:
            raise ValueError("a fleet needs at least one server")
        self._config = config
        self._published = Published()
        # The attribute is replaced as a whole: members read it without a lock.
        self._members = [
            Member(index, launch, config, lambda: self._published) for index, launch in enumerate(launches)
        ]
        self._closed = False

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start every server and wait until all serve, or for ``ready_timeout_s``.

        Goes on with fewer, with a warning; those that never served are given up, as nobody would know their address.

        Raises:
            EngineError: none serves; the fleet is closed.
        """
        for member in self._members:
            member.start()
        deadline = time.monotonic() + self._config.ready_timeout_s + _MARGIN_S
        while time.monotonic() < deadline and any(member.view()[0] not in _SETTLED for member in self._members):
            time.sleep(_POLL_S)
        serving = len(self.serving())
        if serving == 0:
            reason = self._failure(f"none serves after {self._config.ready_timeout_s:g} s")
            self.close()
            raise EngineError(reason)
        if serving < len(self._members):
            _LOG.warning(self._failure(f"only {serving} started; going on with them"))
            for member in self._members:
                if member.address() is None:
                    member.stop()

    def addresses(self) -> tuple[str, ...]:
        """URLs of all servers of the run, those that are being replaced included; they do not change."""
        return tuple(address for member in self._members if (address := member.address()) is not None)

    @property
    def longest_outage_s(self) -> float:
        """How long a server may take to be replaced: noticed, ended, started."""
        config = self._config
        return config.hung_after_s + config.stop_timeout_s + config.ready_timeout_s + _END_S

    def serving(self) -> tuple[Endpoint, ...]:
        """Servers with the published weights, in member order."""
        return self._in_state(State.SERVING)

    def reachable(self) -> tuple[Endpoint, ...]:
        """Servers that can take weights, stale ones included."""
        return self._in_state(State.SERVING, State.STALE)

    def check(self) -> None:
        """Return at once while some server serves or may come back.

        Raises:
            EngineError: every server was given up; says why.
        """
        if all(member.view()[0] in (State.FAILED, State.STOPPED) for member in self._members):
            raise EngineError(self._failure("none is left"))

    def wait_serving(self, deadline_s: float) -> tuple[Endpoint, ...]:
        """Wait until some server serves.

        Raises:
            EngineError: none did within ``deadline_s`` seconds, or none can any more.
        """
        deadline = time.monotonic() + deadline_s
        while not (serving := self.serving()):
            self.check()
            if time.monotonic() > deadline:
                raise EngineError(self._failure(f"none served within {deadline_s:g} s"))
            time.sleep(_POLL_S)
        return serving

    def wait_reachable(self, deadline_s: float) -> tuple[Endpoint, ...]:
        """Wait until every server that was not given up can take weights, or for ``deadline_s`` seconds.

        Raises:
            EngineError: none can.
        """
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline and any(member.view()[0] is State.STARTING for member in self._members):
            time.sleep(_POLL_S)
        if not (reachable := self.reachable()):
            self.check()
            raise EngineError(self._failure(f"none could be reached within {deadline_s:g} s"))
        return reachable

    def published(self, version: int, endpoints: Iterable[Endpoint], restore: Restore | None = None) -> None:
        """New weights are out: ``endpoints`` took them.

        Args:
            version: policy version.
            endpoints: lives of servers that confirmed it, of those that :meth:`reachable` gave before.
            restore: brings them to one more server by URL; None where only the next publication can.
        """
        self._published = Published(version, restore)
        for endpoint in endpoints:
            self._members[endpoint.member].holds(endpoint, version)
        for member in self._members:
            member.settle()
            member.suspect()  # a stale one may be restored now

    def suspect(self, url: str) -> None:
        """A request to the server at ``url`` failed: its member looks at once."""
        for member in self._members:
            endpoint = member.view()[1]
            if endpoint is not None and endpoint.url == url:
                member.suspect()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """No health check generates within: for pauses, updates and released memory. Death is still noticed."""
        with contextlib.ExitStack() as stack:
            for member in self._members:
                stack.enter_context(member.quiet())
            yield

    @contextlib.contextmanager
    def without_starts(self) -> Iterator[None]:
        """No server is started within, and none is starting when the body begins: the memory is somebody else's.

        Raises:
            EngineError: a server that was starting could not be ended.
        """
        for member in self._members:
            member.hold(True)
        try:
            self._await_no_start()
            yield
        finally:
            for member in self._members:
                member.hold(False)

    def _await_no_start(self) -> None:
        deadline = time.monotonic() + self._config.stop_timeout_s + _END_S
        while starting := [member.index for member in self._members if member.is_starting()]:
            if time.monotonic() > deadline:
                raise EngineError(f"the starting SGLang servers {starting} could not be ended")
            time.sleep(_POLL_S)

    def condemn(self, endpoint: Endpoint, reason: str, deadline_s: float) -> None:
        """End a server that failed otherwise than by dying or hanging, and replace it; returns when it is gone.

        Raises:
            EngineError: it is still there after ``deadline_s`` seconds.
        """
        member = self._members[endpoint.member]
        member.condemn(endpoint, reason)
        deadline = time.monotonic() + deadline_s
        while member.is_running(endpoint):
            if time.monotonic() > deadline:
                raise EngineError(f"{endpoint.url} could not be ended within {deadline_s:g} s ({reason})")
            time.sleep(_POLL_S)

    def took(
        self, version: int, fresh: Iterable[str], stale: Mapping[str, str], restore: Restore | None = None
    ) -> None:
        """As :meth:`published`, by URL, for a publisher that knows no lives.

        A server counts as ``fresh`` if it names ``version`` itself: another life of it would not. Those in ``stale``
        (reasons by URL) may hold half of an update and be paused: they are ended and replaced.
        """
        urls = set(fresh)
        lives = self.reachable()
        self.published(version, [life for life in lives if life.url in urls and _names(life.url, version)], restore)
        for life in lives:
            if life.url in stale:
                self._members[life.member].condemn(life, f"it missed version {version}: {stale[life.url]}")

    def metrics(self) -> Mapping[str, float]:
        """Figures of the record, since the start."""
        counters = [member.counters for member in self._members]
        return {
            "sglang/servers": float(len(self.serving())),
            "sglang/restarts": float(sum(counter.restarts for counter in counters)),
            "sglang/hangs": float(sum(counter.hangs for counter in counters)),
            "sglang/unavailable_s": sum(member.unavailable_s() for member in self._members),
        }

    def close(self) -> None:
        """End every server, also after an error; waits until none runs. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for member in self._members:
            member.ask_to_stop()
        for member in self._members:
            member.stop()

    def _in_state(self, *states: State) -> tuple[Endpoint, ...]:
        views = [member.view() for member in self._members]
        return tuple(endpoint for state, endpoint in views if state in states and endpoint is not None)

    def _failure(self, what: str) -> str:
        lines = [f"of {len(self._members)} SGLang servers {what}"]
        for member in self._members:
            state = member.view()[0]
            if state is not State.SERVING:
                why = member.counters.reasons[-1] if member.counters.reasons else "no failure so far"
                lines.append(f"server {member.index} ({state.value}): {why}")
        return "\n".join(lines)


def _names(url: str, version: int) -> bool:
    client = ControlClient(url)
    try:
        return client.server_info().weight_version == str(version)
    except EngineError:
        return False
    finally:
        client.close()


def restore_from_disk(folder: str, version: int, *, timeout_s: float = 120.0) -> Restore:
    """A ``restore`` for weights that stand in a Hugging Face folder which the servers can read."""

    def restore(url: str) -> None:
        client = ControlClient(url, timeout_s=timeout_s)
        try:
            # A flush inside the update kills a server that has just answered a request.
            client.update_from_disk(folder, str(version), flush=False)
            client.flush_cache()
            client.resume()  # it may have missed the update in which it was paused
        finally:
            client.close()

    return restore
