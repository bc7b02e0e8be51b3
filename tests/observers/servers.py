"""Observers of servers that a run starts itself: stand-ins for SGLang, started, hurt and counted."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from observers.core import Observer, Observers

from spear_megatron.config.schema import Config

_SGLANG = "actor_rollout_ref.rollout.sglang"
_LAUNCH = f"{_SGLANG}.launch"
_PROGRAM = f"{_LAUNCH}.python={{scratch}}/stand_in_python"
_GIVEN = (
    "actor_rollout_ref.rollout.name=sglang", _PROGRAM, f"{_LAUNCH}.device=cpu", f"{_LAUNCH}.health_interval_s=0.05",
    f"{_LAUNCH}.restart_backoff_s=0.05", f"{_LAUNCH}.stop_timeout_s=2", f"{_LAUNCH}.ready_timeout_s=60",
)  # fmt: skip


def with_servers(body: Callable[[Any, Path], Any], *options: str) -> Callable[[Config, Path], Any]:
    """Observation of ``body(servers, scratch)``; "failed" where none starts. ``options`` are the stand-in's."""

    def observe(config: Config, scratch: Path) -> Any:
        from stand_in_fleet import stand_in_python

        from spear_megatron.cli.servers import open_rollout_servers
        from spear_megatron.cli.session import open_parallel
        from spear_megatron.model.shape import ModelShape
        from spear_megatron.rollout.engine import EngineError

        stand_in_python(scratch, *options)
        (scratch / "other_python").write_bytes((scratch / "stand_in_python").read_bytes())
        (scratch / "other_python").chmod(0o755)
        shape = ModelShape.from_folder(config.actor_rollout_ref.model.path)
        with open_parallel(config) as parallel:
            try:
                with open_rollout_servers(config, parallel, shape, 128) as servers:
                    return body(servers, scratch)
            except EngineError:
                return "failed", len(starts(scratch))

    return observe


def starts(scratch: Path) -> list[Any]:
    """Arguments and environment of every server that was started."""
    path = scratch / "started.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def number(servers: Any, scratch: Path) -> Any:
    """Servers that are up."""
    return len(servers.urls)


def hosts(servers: Any, scratch: Path) -> Any:
    """Addresses without ports, as a client needs them."""
    return [url.rpartition(":")[0] for url in servers.urls]


def command(config: Config, scratch: Path) -> Any:
    """Command line of a server at ports 1 and 2, and the environment that the configuration adds."""
    from spear_megatron.cli.servers import server_spec
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.rollout.sglang.command import server_command, server_environment

    launch = config.actor_rollout_ref.rollout.sglang.launch
    with open_parallel(config) as parallel:
        spec = server_spec(config, parallel, ModelShape.from_folder(config.actor_rollout_ref.model.path), 128)
    added = {key: value for key, value in server_environment(launch, (), spec).items() if os.environ.get(key) != value}
    return server_command(launch, spec, 1, 2), sorted(added.items())


def kind(config: Config, scratch: Path) -> Any:
    """What starts the servers; without Ray installed its choice is refused."""
    from spear_megatron.cli.servers import server_spec
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.rollout.sglang import start
    from spear_megatron.rollout.sglang.placement import Placement

    launch = config.actor_rollout_ref.rollout.sglang.launch
    with open_parallel(config) as parallel:
        spec = server_spec(config, parallel, ModelShape.from_folder(config.actor_rollout_ref.model.path), 128)
    try:
        launches = start._launches(launch, spec, scratch, Placement(0, (0,), ((),)))
        return [type(item).__name__ for item in launches]
    finally:
        if "ray" in sys.modules:  # the cluster that this asked for would stay as long as the process
            sys.modules["ray"].shutdown()


def logs(servers: Any, scratch: Path) -> Any:
    """Where the logs are."""
    return sorted(str(path.relative_to(scratch)) for path in scratch.rglob("attempt_*.log"))


def post(servers: Any, path: str) -> None:
    """A request to the first server whose answer may never come."""
    import httpx

    try:
        httpx.post(f"{servers.urls[0]}{path}", timeout=0.3, trust_env=False)
    except httpx.HTTPError:
        pass


def kill(scratch: Path) -> None:
    """Kill every stand-in of this observation."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(scratch / "journal.jsonl") in words and not any("guard.py" in word for word in words):
            process.kill()


def soon(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def replaced_after_hang(servers: Any, scratch: Path) -> Any:
    """Whether a server that answers nothing is soon replaced."""
    post(servers, "/hang")
    return soon(lambda: servers.fleet.metrics()["sglang/hangs"] == 1, 12.0)


def often_asked(servers: Any, scratch: Path) -> Any:
    """Whether a server is asked for its health often."""
    asked = (scratch / "journal.jsonl").read_text().count("/health")
    return soon(lambda: (scratch / "journal.jsonl").read_text().count("/health") >= asked + 3, 3.0)


def replaced_soon(servers: Any, scratch: Path) -> Any:
    """Whether a killed server is soon replaced."""
    kill(scratch)
    return soon(lambda: len(starts(scratch)) == 2, 8.0)


def replaced_twice(servers: Any, scratch: Path) -> Any:
    """Whether a server that serves for a moment and is killed, twice, is replaced twice."""
    for life in (0, 1):
        soon(lambda: any(end.attempt == life for end in servers.fleet.serving()), 15.0)
        time.sleep(0.4)
        kill(scratch)
        soon(lambda: not servers.fleet.serving(), 15.0)
    return soon(lambda: len(starts(scratch)) == 3, 5.0)


def stubborn_end(config: Config, scratch: Path) -> Any:
    """Whether the end of a server that ignores the request to end takes more than 3 s."""
    ended: list[float] = []
    with_servers(lambda servers, scratch: ended.append(time.monotonic()), "--stubborn")(config, scratch)
    return time.monotonic() - ended[0] > 3.0


def observer(
    body: Callable[..., Any], *values: str, given: tuple[str, ...] = (), options: tuple[str, ...] = ()
) -> Observer:
    """An observer with started servers."""
    one, other = values
    return Observer(with_servers(body, *options), (one, other), (*_GIVEN, *given))


def plain(body: Callable[[Config, Path], Any], *values: str, given: tuple[str, ...] = ()) -> Observer:
    """An observer that starts nothing by itself."""
    one, other = values
    return Observer(body, (one, other), (*_GIVEN, *given))


_ON_GPU = (f"{_LAUNCH}.device=cuda",)
OBSERVERS: Observers = {
    f"{_SGLANG}.colocated": plain(command, "false", "true", given=(f"{_LAUNCH}.device=cuda",)),
    f"{_LAUNCH}.num_servers": observer(number, "1", "2"),
    f"{_LAUNCH}.python": plain(command, "{scratch}/stand_in_python", "{scratch}/other_python"),
    f"{_LAUNCH}.backend": plain(kind, "process", "ray"),
    f"{_LAUNCH}.device": plain(command, "cpu", "cuda"),
    f"{_LAUNCH}.tp_size": plain(command, "1", "2", given=_ON_GPU),
    f"{_LAUNCH}.host": observer(hosts, "127.0.0.1", "localhost"),
    f"{_LAUNCH}.args": plain(command, "{{}}", "{{max-total-tokens: 99}}"),
    f"{_LAUNCH}.env": plain(command, "{{}}", "{{SPEAR_OBSERVED: yes it is}}"),
    f"{_LAUNCH}.ready_timeout_s": observer(
        number, "60", "0.3", given=(f"{_LAUNCH}.max_restarts=0",), options=("--slow", "2")
    ),
    f"{_LAUNCH}.stop_timeout_s": plain(stubborn_end, "0.2", "4"),
    f"{_LAUNCH}.health_interval_s": observer(often_asked, "0.05", "30"),
    f"{_LAUNCH}.hung_after_s": observer(replaced_after_hang, "0.5", "60"),
    f"{_LAUNCH}.max_restarts": observer(number, "0", "1", options=("--exit", "3")),
    f"{_LAUNCH}.restart_backoff_s": observer(replaced_soon, "0.05", "60"),
    f"{_LAUNCH}.stable_s": observer(replaced_twice, "0.2", "600", given=(f"{_LAUNCH}.max_restarts=1",)),
    f"{_LAUNCH}.log_folder": observer(logs, "null", "{scratch}/logs"),
}
