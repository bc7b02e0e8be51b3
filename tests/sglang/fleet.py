"""Fleets of real servers for the tests of this folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import PYTHON

from spear_megatron.rollout.sglang.command import ServerSpec
from spear_megatron.rollout.sglang.fleet import Fleet
from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.local_fleet import local_launches


def cpu_spec(folder: Path) -> ServerSpec:
    """What the tests' servers serve."""
    return ServerSpec(
        model_path=str(folder), dtype="float32", context_length=512, max_running_requests=8, on_cpu=True
    )


def launch_config(**changes: Any) -> SGLangLaunchConfig:
    """Settings of servers on this CPU, with short times."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make sglang-server`, or set SPEAR_SGLANG_PYTHON")
    settings: dict[str, Any] = dict(
        python=str(PYTHON), device="cpu", ready_timeout_s=240.0, stop_timeout_s=8.0, health_interval_s=0.25,
        hung_after_s=10.0, restart_backoff_s=0.1, max_restarts=3, args={"max-total-tokens": 4096, "random-seed": 1},
    )  # fmt: skip
    return SGLangLaunchConfig(**{**settings, **changes})


def open_fleet(folder: Path, run_dir: Path, num_servers: int = 1, **changes: Any) -> Fleet:
    """A fleet that is not started yet."""
    config = launch_config(**changes)
    numbers = range(num_servers)
    return Fleet(local_launches(config, cpu_spec(folder), run_dir, numbers, [()] * num_servers), config)


def processes_of(fleet_url: str) -> list[psutil.Process]:
    """The server's processes, the one that listens first."""
    port = fleet_url.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--port" in words and words[words.index("--port") + 1] == port and "guard.py" not in " ".join(words):
            return [process, *process.children(recursive=True)]
    raise AssertionError(f"no server at {fleet_url}")


def commands_with(text: str) -> list[str]:
    """Command lines of running processes that contain ``text``."""
    commands = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [command for command in commands if text in command]


def scheduler_of(processes: list[psutil.Process]) -> psutil.Process:
    """The process that computes."""
    titles = {process: " ".join(process.cmdline()) for process in processes[1:]}
    found = [process for process, title in titles.items() if "scheduler" in title]
    assert found, titles
    return found[0]


def generate(url: str, num_tokens: int, timeout_s: float = 60.0) -> dict[str, Any]:
    """Greedy tokens; raises httpx.HTTPError."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": [5, 60, 7], "sampling_params": sampling, "return_logprob": True}
    answer = httpx.post(f"{url}/generate", json=body, timeout=timeout_s, trust_env=False)
    answer.raise_for_status()
    return answer.json()


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Wait for a true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return value


def in_background(call: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run a call on a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *args)
    threading.Thread(target=pool.shutdown, daemon=True).start()
    return future
