"""Environments in worker processes: state stays with its episode, losses are typed, workers are replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted import ScriptedEngine, tiny_renderer

from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.environments.protocol import Turn
from spear_megatron.environments.sandbox.config import SandboxConfig
from spear_megatron.environments.workers import pool as pool_module
from spear_megatron.environments.workers.config import WorkersConfig
from spear_megatron.environments.workers.factory import open_workers
from spear_megatron.environments.workers.pool import WorkerError, WorkerLost, WorkerPool
from spear_megatron.environments.workers.process import share_sandbox
from spear_megatron.rollout.agent_loop import EpisodeLimits
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.rollout.scheduler import EpisodeRunner, collect_groups
from spear_megatron.testing.environment import check_environment
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory

PROMPT = Prompt("task", ({"role": "user", "content": "hello"},))


def config_of(number: int = 1, kwargs: dict[str, Any] | None = None, **workers: Any) -> EnvironmentConfig:
    settings = WorkersConfig(backend="process", number=number, **workers)
    return EnvironmentConfig(name="worker_environments:Obedient", kwargs=kwargs or {}, workers=settings)


def turn(text: str) -> Turn:
    return Turn(text, (), finished=True)


def run(config: EnvironmentConfig, body: Callable[[WorkerPool], Awaitable[Any]]) -> Any:
    """Await ``body(pool)`` and close the pool; no process is left."""

    async def everything() -> Any:
        pool = open_workers(config)
        try:
            return await body(pool)
        finally:
            workers = [worker for worker in pool._workers if worker is not None and not worker.lost]
            processes = [psutil.Process(worker.pid) for worker in workers]
            await pool.close()
            assert not any(process.is_running() for process in processes)

    return asyncio.run(everything())


async def say(environment: Any, text: str) -> str:
    return (await environment.step(turn(text))).messages[0]["content"]


def test_many_episodes_share_workers_and_each_keeps_its_state() -> None:
    async def body(pool: WorkerPool) -> None:
        episodes = [pool.environment() for _ in range(6)]
        observations = await asyncio.gather(*(episode.reset(PROMPT) for episode in episodes))
        assert all(observation.messages == PROMPT.messages for observation in observations)
        for index, episode in enumerate(episodes):
            for count in range(1, index + 1):
                assert await say(episode, "x") == f"{count} x"
        pids = [await say(episode, "pid") for episode in episodes]
        assert len(set(pids)) == 2 and all(pids.count(pid) == 3 for pid in pids) and str(os.getpid()) not in pids
        began = time.monotonic()
        await asyncio.gather(*(say(episode, "sleep 1.0") for episode in episodes))
        assert time.monotonic() - began < 2.8  # one after the other, the three of a worker would take 3 s
        await asyncio.gather(*(episode.close() for episode in episodes))
        assert pool._loads == [0, 0] and pool.num_restarts == 0

    run(config_of(2), body)


def test_the_contract_holds_for_an_environment_with_a_sandbox() -> None:
    workers = WorkersConfig(backend="process", number=1)
    pool = open_workers(EnvironmentConfig(workers=workers, sandbox=SandboxConfig(preload=())))
    call = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(2 + 2)"}}\n</tool_call>'
    check_environment(pool.environment, PROMPT, turns=(call, "\\boxed{4}"))
    asyncio.run(pool.close())


def test_what_an_environment_raises_fails_its_episode_alone() -> None:
    async def body(pool: WorkerPool) -> None:
        first, second = pool.environment(), pool.environment()
        await first.reset(PROMPT)
        await second.reset(PROMPT)
        with pytest.raises(WorkerError, match=r"KeyError: 'told to' \(worker_environments.py:\d+\)"):
            await say(first, "raise")
        with pytest.raises(WorkerError, match="the result of step cannot be sent"):
            await say(first, "odd")
        assert await say(second, "x") == "1 x"
        assert await say(first, "x") == "3 x"
        with pytest.raises(WorkerError, match="step before reset"):
            await say(pool.environment(), "x")
        assert pool.num_restarts == 0

    run(config_of(), body)


def test_a_lost_worker_fails_its_episodes_and_is_replaced() -> None:
    async def body(pool: WorkerPool) -> None:
        episodes = [pool.environment() for _ in range(4)]
        for episode in episodes:
            await episode.reset(PROMPT)
        pids = [int(await say(episode, "pid")) for episode in episodes]
        waiting = asyncio.ensure_future(say(episodes[0], "sleep 60"))
        await asyncio.sleep(0.1)
        os.killpg(pids[0], signal.SIGKILL)
        with pytest.raises(WorkerLost, match="killed by SIGKILL"):
            await waiting
        for episode, pid in zip(episodes, pids, strict=True):
            if pid == pids[0]:
                with pytest.raises(WorkerLost):
                    await say(episode, "x")
            else:
                assert await say(episode, "x") == "2 x"
        for episode in episodes:
            await episode.close()
        fresh = [pool.environment() for _ in range(2)]
        for episode in fresh:
            await episode.reset(PROMPT)
        assert pids[0] not in [int(await say(episode, "pid")) for episode in fresh]
        assert pool.num_restarts == 1

    run(config_of(2), body)


def test_a_worker_that_leaves_tells_its_code_and_losses_are_limited() -> None:
    async def body(pool: WorkerPool) -> None:
        for attempt in range(2):
            episode = pool.environment()
            await episode.reset(PROMPT)
            with pytest.raises(WorkerLost, match="exited with code 3"):
                await say(episode, "die")
            await episode.close()
        with pytest.raises(WorkerLost, match="2 environment workers were lost, more than env.workers.max_restarts=1"):
            await pool.environment().reset(PROMPT)

    run(config_of(max_restarts=1), body)


def test_a_late_step_fails_its_episode_and_a_blocked_worker_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_PING_S", 1.0)

    async def body(pool: WorkerPool) -> None:
        first, second = pool.environment(), pool.environment()
        await first.reset(PROMPT)
        await second.reset(PROMPT)
        with pytest.raises(WorkerError, match="step took longer than env.workers.timeout_s=0.6 s"):
            await say(first, "sleep 60")
        assert await say(second, "x") == "1 x"
        with pytest.raises(WorkerLost, match="it hangs: step took longer"):
            await say(first, "block 60")
        with pytest.raises(WorkerLost):
            await say(second, "x")

    run(config_of(timeout_s=0.6), body)


def test_closing_an_episode_ends_its_running_step(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def body(pool: WorkerPool) -> None:
        episode = pool.environment()
        await episode.reset(PROMPT)
        step = asyncio.ensure_future(say(episode, "sleep 60"))
        while "sleeping" not in journal.read_text():
            await asyncio.sleep(0.02)
        step.cancel()
        await episode.close()
        await episode.close()
        assert journal.read_text().splitlines() == ["reset task", "sleeping", "close after 1"]

    run(config_of(kwargs={"journal": str(journal)}), body)


def test_an_environment_that_cannot_be_made_is_named_with_its_reason() -> None:
    async def body(pool: WorkerPool) -> None:
        with pytest.raises(WorkerError, match="RuntimeError: cannot be made"):
            await pool.environment().reset(PROMPT)

    run(config_of(kwargs={"fail": True}), body)
    with pytest.raises(ValueError, match="unknown"):
        open_workers(config_of(kwargs={"unknown": 1}))
    with pytest.raises(ValueError, match="backend=local"):
        open_workers(EnvironmentConfig(name="grid_world"))


def test_a_pool_can_be_used_from_one_event_loop_after_another() -> None:
    pool = open_workers(config_of())

    async def pid() -> int:
        episode = pool.environment()
        await episode.reset(PROMPT)
        return int(await say(episode, "pid"))

    first = asyncio.run(pid())
    assert asyncio.run(pid()) != first
    assert not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE
    asyncio.run(pool.close())
    with pytest.raises(WorkerLost, match="were closed"):
        asyncio.run(pid())


def test_workers_end_with_a_killed_trainer() -> None:
    code = """
import asyncio, sys
from test_environment_workers import PROMPT, config_of, open_workers, say, turn
async def main():
    pool = open_workers(config_of())
    episode = pool.environment()
    await episode.reset(PROMPT)
    print(await say(episode, "pid"), flush=True)
    await say(episode, "block 60")
asyncio.run(main())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def no_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
    return trajectory.reward


def runner(pool: WorkerPool, script: list[str]) -> EpisodeRunner:
    limits = EpisodeLimits(
        max_turns=3, max_prompt_length=64, max_response_length=400, max_model_len=464, max_tool_response_length=100
    )
    return EpisodeRunner(
        engine=ScriptedEngine(script), renderer=tiny_renderer(), environment_factory=pool.environment,
        reward=no_reward, limits=limits, sampling=SamplingParams(64), seed=0, purpose="train",
    )  # fmt: skip


def test_episodes_of_a_lost_worker_run_once_more_and_none_is_lost_or_doubled(tmp_path: Path) -> None:
    prompts = [(index, Prompt(f"task{index}", PROMPT.messages)) for index in range(3)]
    prompts.append((3, Prompt(f"once-{tmp_path / 'died'}", PROMPT.messages)))

    async def body(pool: WorkerPool) -> Any:
        run_one = runner(pool, ["go on", "end"])
        return await collect_groups(prompts, run=run_one, step=1, num_samples=2, max_concurrency=3, deadline_s=60.0)

    groups = run(config_of(2), body)
    found = [trajectory.id for group in groups for trajectory in group.trajectories]
    assert found == sorted(set(found)) and len(found) == 8
    for group in groups:
        for trajectory in group.trajectories:
            assert trajectory.stop_reason is StopReason.ANSWER and trajectory.num_turns == 2
    assert (tmp_path / "died").exists()


def test_an_episode_that_loses_two_workers_is_excluded_and_not_scored() -> None:
    async def body(pool: WorkerPool) -> Any:
        run_one = runner(pool, ["die"])
        return await run_one(PROMPT, (1, 0, 0))  # type: ignore[arg-type]

    trajectory = run(config_of(), body)
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE and not trajectory.valid
    assert "WorkerLost" in trajectory.error and "exited with code 3" in trajectory.error


def test_workers_share_the_programs_of_the_sandbox() -> None:
    config = EnvironmentConfig(sandbox=SandboxConfig(workers=7), workers=WorkersConfig(backend="process", number=3))
    assert share_sandbox(config).sandbox.workers == 3


@pytest.mark.parametrize(
    "wrong", [{"backend": "slurm"}, {"number": 0}, {"max_restarts": -1}, {"timeout_s": 0}, {"start_timeout_s": 1e7}]
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"env.workers.{next(iter(wrong))}"):
        WorkersConfig(**wrong)
