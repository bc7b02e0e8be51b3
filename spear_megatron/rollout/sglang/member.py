"""One place of a fleet: the server in it, watched and replaced by a thread of its own."""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang import health
from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.process import Launch, ServerHandle

_LOG = logging.getLogger(__name__)
_START_POLL_S = 0.25
_LONGEST_PAUSE_S = 60.0
_PUT_OFF = "its start was put off"
Restore = Callable[[str], None]
"""Brings the server at a URL to the published weights; raises EngineError when it cannot."""


class State(enum.Enum):
    """What a member's server can be asked for."""

    STARTING = "starting"  # not yet, or not again
    STALE = "stale"  # answers, but holds other weights than the published ones
    SERVING = "serving"
    FAILED = "failed"  # given up
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One life of a server: a replacement at the same URL is another one."""

    url: str
    member: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Published:
    """What servers should hold: nothing yet (None), or a policy version and how to bring it to one server."""

    version: int | None = None
    restore: Restore | None = None


@dataclass
class Counters:
    """What a member went through. ``unavailable_s`` counts time out of service after it served for the first time."""

    restarts: int = 0
    hangs: int = 0
    unavailable_s: float = 0.0
    reasons: list[str] = field(default_factory=list)


class Member:
    """Keeps one server in service until it is stopped or fails too often.

    Args:
        index: number within the fleet, for messages.
        launch: starts one attempt.
        config: deadlines, patience and limits.
        published: what a server should hold, asked when one has started.
    """

    def __init__(
        self, index: int, launch: Launch, config: SGLangLaunchConfig, published: Callable[[], Published]
    ) -> None:
        self.index = index
        self.counters = Counters()
        self._launch = launch
        self._config = config
        self._published = published
        self._lock = threading.Lock()
        self._restoring = threading.Lock()  # held while published weights are brought to the server
        self._asking = threading.Lock()  # held while the scheduler is asked for a token
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._state = State.STARTING
        self._endpoint: Endpoint | None = None
        self._launched = False
        self._running: Endpoint | None = None
        self._version: int | None = None
        self._down_since: float | None = None
        self._quiet = 0
        self._condemned: tuple[Endpoint, str] | None = None
        self._may_start = threading.Event()
        self._may_start.set()
        self._thread = threading.Thread(target=self._run, name=f"sglang-server-{index}", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def view(self) -> tuple[State, Endpoint | None]:
        """State, and the server's present life where it answers."""
        with self._lock:
            return self._state, self._endpoint if self._state in (State.SERVING, State.STALE) else None

    def is_running(self, endpoint: Endpoint) -> bool:
        """Whether something of this life of the server may still run."""
        with self._lock:
            return self._running == endpoint

    def address(self) -> str | None:
        """Where it served first and will serve again; None before that."""
        with self._lock:
            return self._endpoint.url if self._endpoint is not None else None

    def unavailable_s(self) -> float:
        """Seconds out of service so far, the present outage included."""
        with self._lock:
            running = 0.0 if self._down_since is None else time.monotonic() - self._down_since
            return self.counters.unavailable_s + running

    def suspect(self) -> None:
        """Somebody could not reach the server: look now."""
        self._wake.set()

    def holds(self, endpoint: Endpoint, version: int) -> None:
        """This life of the server has the weights of ``version`` now; says nothing of another life."""
        with self._lock:
            if self._endpoint == endpoint:
                self._version = version

    def settle(self) -> None:
        """Compare what the server holds with what is published."""
        with self._lock:
            if self._state in (State.SERVING, State.STALE):
                wanted = self._published().version
                self._set(State.SERVING if wanted in (None, self._version) else State.STALE)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No generation is asked of the server within, and none is under way when the body begins."""
        with self._restoring, self._asking:
            self._quiet += 1
        try:
            yield
        finally:
            with self._asking:
                self._quiet -= 1

    def hold(self, held: bool) -> None:
        """Whether no server may be started now; one that has not yet answered is ended, one that has goes on."""
        with self._lock:
            self._may_start.clear() if held else self._may_start.set()

    def is_starting(self) -> bool:
        """Whether something runs that has not answered yet."""
        with self._lock:
            return self._launched and self._running is None

    def condemn(self, endpoint: Endpoint, reason: str) -> None:
        """End this life of the server, and replace it as if it had died."""
        self._condemned = endpoint, reason
        self._wake.set()

    def ask_to_stop(self) -> None:
        """Begin to end the server; returns at once."""
        self._stopping.set()
        self._wake.set()
        self._may_start.set()

    def stop(self) -> None:
        """End the server and the thread; waits until both are gone."""
        self.ask_to_stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        attempt = in_a_row = 0
        while not self._stopping.is_set():
            reason, served_s = self._life(attempt)
            if self._stopping.is_set():
                break
            if reason == _PUT_OFF:
                self._may_start.wait()
                continue
            in_a_row = 0 if served_s >= self._config.stable_s else in_a_row
            if in_a_row >= self._config.max_restarts:
                with self._lock:
                    self._set(State.FAILED)
                _LOG.error("SGLang server %d is given up after %d restarts: %s", self.index, in_a_row, reason)
                return
            pause_s = min(self._config.restart_backoff_s * 2**in_a_row, _LONGEST_PAUSE_S)
            attempt, in_a_row = attempt + 1, in_a_row + 1
            _LOG.warning("SGLang server %d is started again in %.1f s: %s", self.index, pause_s, reason)
            self._stopping.wait(pause_s)
            self._may_start.wait()
            self.counters.restarts += not self._stopping.is_set()
        with self._lock:
            self._set(State.STOPPED)

    def _life(self, attempt: int) -> tuple[str, float]:
        """Start a server and watch it to its end: why it ended, and for how long it answered."""
        with self._lock:
            self._launched = self._may_start.is_set()
            if not self._launched:
                return _PUT_OFF, 0.0
        try:
            server = self._launch(attempt, self.address())
        except (EngineError, OSError) as error:
            reason = f"it cannot be started: {error}"
            self.counters.reasons.append(reason)
            with self._lock:
                self._launched = False
            return reason, 0.0
        began: float | None = None
        try:
            failure = self._await_ready(server)
            if failure is None:
                began = time.monotonic()
                endpoint = Endpoint(server.url, self.index, attempt)
                self._enter_service(endpoint)
                failure = self._watch(server, endpoint)
            if not self._stopping.is_set() and failure != _PUT_OFF:
                self.counters.reasons.append(failure)
            return failure, 0.0 if began is None else time.monotonic() - began
        finally:
            with self._lock:
                self._set(State.STOPPED if self._stopping.is_set() else State.STARTING)
            # One that hangs would not hear the request to end.
            server.stop(self._config.stop_timeout_s if self._stopping.is_set() else 0.0)
            with self._lock:
                self._launched, self._running = False, None

    def _await_ready(self, server: ServerHandle) -> str | None:
        deadline = time.monotonic() + self._config.ready_timeout_s
        while not self._stopping.wait(_START_POLL_S):
            death = server.death()
            if death is not None:
                return death
            if not self._may_start.is_set():
                return _PUT_OFF
            if health.answers(server.url):
                return None
            if time.monotonic() > deadline:
                waited = f"{server.url} did not answer within ready_timeout_s={self._config.ready_timeout_s:g} s"
                return f"{waited}\n{server.log_tail()}"
        return "stopped"

    def _enter_service(self, endpoint: Endpoint) -> None:
        with self._lock:
            self._endpoint = self._running = endpoint
            self._version = None
            self._set(State.STALE)
        self.settle()
        self._restore(endpoint)

    def _restore(self, endpoint: Endpoint) -> None:
        """Bring the published weights to a stale server, where that can be done without the trainer."""
        with self._restoring:  # no publication begins meanwhile, and none is under way
            published = self._published()
            stale = self.view()[0] is State.STALE and not self._quiet
            if not stale or published.restore is None or published.version is None:
                return
            try:
                published.restore(endpoint.url)  # the thread of the health checks is this one
            except EngineError as error:
                _LOG.warning("SGLang server %d waits for the next publication: %s", self.index, error)
                return
            self.holds(endpoint, published.version)
        self.settle()

    def _watch(self, server: ServerHandle, endpoint: Endpoint) -> str:
        """Until the server dies, hangs or is to stop."""
        config = self._config
        asked, works = time.monotonic(), True
        trouble_since: float | None = None
        while not self._stopping.is_set():
            death = server.death()
            if death is not None:
                return death
            if self._condemned is not None and self._condemned[0] == endpoint:
                return self._condemned[1]
            began = time.monotonic()
            answers = health.answers(server.url)
            if answers and (not works or began - asked > config.hung_after_s / 4):
                asked, works = began, self._generates(server.url)
            trouble_since = None if answers and works else trouble_since or began
            silent_s = 0.0 if trouble_since is None else time.monotonic() - trouble_since
            if silent_s > config.hung_after_s and server.death() is None:
                self.counters.hangs += 1
                return f"{server.url} hangs: no answer for {silent_s:.0f} s (hung_after_s={config.hung_after_s:g})"
            if answers:
                self._restore(endpoint)
            self._wake.wait(config.health_interval_s)
            self._wake.clear()
        return "stopped"

    def _generates(self, url: str) -> bool:
        with self._asking:
            timeout_s = min(health.GENERATE_S, self._config.hung_after_s)
            return self._quiet > 0 or health.generates(url, timeout_s)

    def _set(self, state: State) -> None:
        """Change the state, with the lock held, and keep account of the time out of service."""
        now = time.monotonic()
        if state is State.SERVING and self._down_since is not None:
            self.counters.unavailable_s += now - self._down_since
            self._down_since = None
        elif self._state is State.SERVING and state not in (State.SERVING, State.STOPPED):
            self._down_since = now
        self._state = state
