"""Environment workers and SGLang servers below Ray actors, on a cluster of this machine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from stand_in_fleet import gone, quick_config, stand_in_python, until

from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.environments.protocol import Turn
from spear_megatron.environments.workers.config import WorkersConfig
from spear_megatron.environments.workers.factory import open_workers
from spear_megatron.environments.workers.pool import WorkerError, WorkerLost
from spear_megatron.parallel import ray_cluster
from spear_megatron.rollout.sglang.command import ServerSpec
from spear_megatron.rollout.sglang.fleet import Fleet
from spear_megatron.types import Prompt

PROMPT = Prompt("task", ({"role": "user", "content": "hello"},))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    module = pytest.importorskip("ray", reason="Ray is not installed: pip install 'spear-megatron[ray]'")
    module.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()


async def say(environment: Any, text: str) -> str:
    return (await environment.step(Turn(text, (), finished=True))).messages[0]["content"]


def test_a_missing_ray_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(ray_cluster.importlib, "import_module", missing)
    config = EnvironmentConfig(name="worker_environments:Obedient", workers=WorkersConfig(backend="ray"))
    with pytest.raises(ValueError, match=r"backend=ray needs Ray.*pip install 'spear-megatron\[ray\]'"):
        ray_cluster.require_ray()
    monkeypatch.undo()
    monkeypatch.setattr(ray_cluster, "require_ray", lambda: (_ for _ in ()).throw(ValueError("needs Ray")))
    with pytest.raises(ValueError, match="needs Ray"):
        open_workers(config)


def test_environments_live_in_actors_and_a_lost_actor_is_replaced(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = WorkersConfig(backend="ray", number=2, timeout_s=5.0)

    async def body() -> None:
        pool = open_workers(EnvironmentConfig(name="worker_environments:Obedient", workers=settings))
        episodes = [pool.environment() for _ in range(4)]
        for episode in episodes:
            assert (await episode.reset(PROMPT)).messages == PROMPT.messages
        for episode in episodes:
            assert [await say(episode, "x") for _ in range(2)] == ["1 x", "2 x"]
        with pytest.raises(WorkerError, match="KeyError: 'told to'"):
            await say(episodes[0], "raise")
        pids = [int(await say(episode, "pid")) for episode in episodes]
        assert len(set(pids)) == 2 and os.getpid() not in pids
        psutil.Process(pids[0]).kill()
        with pytest.raises(WorkerLost, match="an environment worker was lost"):
            await say(episodes[0], "sleep 3")
        other = next(index for index, pid in enumerate(pids) if pid != pids[0])
        assert (await say(episodes[other], "x")).endswith(" x")
        for episode in episodes:
            await episode.close()
        again = pool.environment()
        await again.reset(PROMPT)
        assert await say(again, "x") == "1 x"
        second = pool.environment()
        await second.reset(PROMPT)
        assert pool.num_restarts == 1
        await pool.close()
        until(lambda: all(gone(pid) for pid in pids))

    asyncio.run(body())


def test_a_server_below_an_actor_is_served_replaced_and_ended(ray: Any, tmp_path: Path) -> None:
    from spear_megatron.rollout.sglang.ray_fleet import ray_launches

    config = quick_config(python=stand_in_python(tmp_path), backend="ray", ready_timeout_s=60.0, hung_after_s=5.0)
    spec = ServerSpec(model_path="model", dtype="float32", context_length=64, max_running_requests=1, on_cpu=True)
    with Fleet(ray_launches(config, spec, tmp_path / "run", [0]), config) as fleet:
        fleet.start()
        (before,) = fleet.serving()
        port = before.url.rpartition(":")[2]

        def processes() -> list[psutil.Process]:
            found = psutil.process_iter(["cmdline"])
            return [process for process in found if port in (process.info["cmdline"] or [])]

        first = processes()
        server = [process for process in first if "stand_in_server.py" in " ".join(process.info["cmdline"])]
        server[-1].kill()
        until(lambda: fleet.serving() and fleet.serving()[0].attempt == 1, 60.0)
        assert fleet.serving()[0].url == before.url
        assert (tmp_path / "run" / "sglang" / "server_0" / "attempt_1.log").exists()
        actor = psutil.Process(processes()[0].pid)
        while "guard.py" not in " ".join(actor.cmdline()):
            actor = actor.parent()
        actor.parent().kill()  # the actor itself: its guard ends the server
        until(lambda: fleet.serving() and fleet.serving()[0].attempt == 2, 60.0)
        assert "Ray actor" in fleet._members[0].counters.reasons[-1]
        last = processes()
    until(lambda: all(gone(process.pid) for process in (*first, *last)))
