"""Fleets of stand-in servers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.ports import Ports
from spear_megatron.rollout.sglang.process import LocalServer, address_of

SERVER = Path(__file__).with_name("stand_in_server.py")
QUICK = dict(
    ready_timeout_s=20.0, stop_timeout_s=2.0, health_interval_s=0.05, hung_after_s=1.0, restart_backoff_s=0.05,
    max_restarts=2,
)  # fmt: skip


def quick_config(**changes: Any) -> SGLangLaunchConfig:
    """Settings with short times."""
    return SGLangLaunchConfig(**{**QUICK, **changes})


@dataclass
class StandInLaunch:
    """Starts stand-in servers; ``options(attempt)`` gives their further arguments."""

    folder: Path
    number: int = 0
    options: Callable[[int], list[str]] = lambda attempt: []
    ports: Ports = field(default_factory=lambda: Ports("127.0.0.1"))
    log: Path | None = None
    port: int | None = None
    servers: list[LocalServer] = field(default_factory=list)

    def __call__(self, attempt: int, address: str | None = None) -> LocalServer:
        self.port = int(address.rpartition(":")[2]) if address else self.ports.choose()
        server = LocalServer(
            [sys.executable, str(SERVER), str(self.port), str(self.journal), *self.options(attempt)],
            url=address_of("127.0.0.1", self.port),
            environment=dict(os.environ),
            log=self.log or self.folder / f"server_{self.number}" / f"attempt_{attempt}.log",
            grace_s=2.0,
        )
        self.servers.append(server)
        return server

    @property
    def journal(self) -> Path:
        """What the server was asked."""
        return self.folder / f"journal_{self.number}.jsonl"

    def requests(self) -> list[tuple[str, Any]]:
        """Path and body of every request but health checks."""
        lines = [json.loads(line) for line in self.journal.read_text().splitlines()]
        return [(line["path"], line["body"]) for line in lines if not line["path"].startswith("/health")]

    def refuse(self, path: str, url: str) -> None:
        """From now on the server at ``url`` answers ``path`` with an error."""
        httpx.post(f"{url}/refuse", json={"path": path}, trust_env=False)

    def process(self) -> psutil.Process:
        """The running server itself, below its guard."""
        return psutil.Process(self.servers[-1].pid).children()[0]


def until(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Wait for a true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return value


def gone(pid: int) -> bool:
    """Whether no such process runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def weight_version(url: str) -> str:
    """Label of the server's weights."""
    return str(httpx.get(f"{url}/get_model_info", trust_env=False).json()["weight_version"])


def stand_in_python(folder: Path, *options: str) -> str:
    """A program for ``launch.python`` that starts a stand-in server in place of SGLang, at the port it is told.

    Its arguments and environment go to ``folder``/started.jsonl, a line of JSON for each start.
    """
    script = folder / "stand_in_python"
    command = [sys.executable, str(SERVER), "PORT", str(folder / "journal.jsonl"), *options]
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"command = {command!r}\n"
        "command[2] = sys.argv[sys.argv.index('--port') + 1]\n"
        f"with open({str(folder / 'started.jsonl')!r}, 'a') as file:\n"
        "    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + '\\n')\n"
        "os.execv(command[0], command)\n"
    )
    script.chmod(0o755)
    return str(script)
