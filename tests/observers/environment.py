"""Observers of ``env.*`` and ``reward.*``: real environments, rewards and sandboxed programs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from observers.core import Observer, Observers
from observers.scripted_run import trajectory

from spear_megatron.config.schema import Config
from spear_megatron.environments.protocol import ToolCall, Turn
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus
from spear_megatron.types import Prompt, RewardParts, Trajectory, TrajectoryId

_SANDBOX = "env.sandbox"


class Constant:
    """A reward that is always 7."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        """7, and a success."""
        return RewardParts(outcome=7.0, success=True)


class _NoProgram:
    """Stands in for a sandbox: every program prints 1."""

    async def run(self, code: str) -> ExecutionResult:
        return ExecutionResult(status=ExecutionStatus.OK, stdout="1\n")

    async def close(self) -> None:
        pass


def turn_with_two_calls(config: Config, scratch: Path) -> Any:
    """Class of the environment and its answer to two calls."""
    from spear_megatron.environments.registry import environment_factory

    environment = environment_factory(config.env, _NoProgram())()
    call = ToolCall("code_interpreter", {"code": "print(1)"}, raw="")
    step = asyncio.run(environment.step(Turn("", (call, call), finished=True)))
    return type(environment).__name__, [message["content"] for message in step.messages]


def score(config: Config, scratch: Path) -> Any:
    """Reward of a right answer."""
    from spear_megatron.rewards.registry import build_reward

    reward = build_reward(config.reward)
    parts = asyncio.run(reward(Prompt("task", (), answer="2"), trajectory(Prompt("task", ()), TrajectoryId(1, 0, 2))))
    return parts.outcome


def programs(*codes: str) -> Callable[[Config, Path], Any]:
    """Observer function: how programs end that are started together, one after the other had a head start."""

    def observe(config: Config, scratch: Path) -> Any:
        async def run() -> Any:
            from spear_megatron.environments.sandbox.factory import open_sandbox

            sandbox = open_sandbox(config.env.sandbox)
            try:
                results = await asyncio.gather(*(sandbox.run(code) for code in codes))
            finally:
                await sandbox.close()
            return [(r.status.value, r.detail, len(r.stdout), r.stdout[:200]) for r in results]

        return asyncio.run(run())

    return observe


def backend(config: Config, scratch: Path) -> Any:
    """The sandbox that stands behind the environment."""
    from spear_megatron.cli.agents import open_environment

    return type(open_environment(config)[1]).__name__


def threads(config: Config, scratch: Path) -> Any:
    """How a program with five threads ends where namespaces work; elsewhere only what the jail would be told."""
    from spear_megatron.environments.sandbox.local import server_settings, try_backend

    if try_backend("namespaces") is not None:
        return server_settings(config.env.sandbox, "namespaces").to_json()
    return programs(_THREADS)(config, scratch)


def after_a_death(config: Config, scratch: Path) -> Any:
    """How a program ends whose sandbox server was killed just before it."""

    async def run() -> Any:
        from spear_megatron.environments.sandbox.factory import open_sandbox

        sandbox: Any = open_sandbox(config.env.sandbox)
        try:
            await sandbox.run("print(1)")
            sandbox._connection._process._process.kill()
            while sandbox._connection.failure is None:
                await asyncio.sleep(0.01)
            return (await sandbox.run("print(2)")).status.value
        finally:
            await sandbox.close()

    return asyncio.run(run())


def with_workers(words: str, episodes: int = 1) -> Callable[[Config, Path], Any]:
    """Observer function: the answers of every episode to ``words``, one after the other, or how they fail."""

    def observe(config: Config, scratch: Path) -> Any:
        async def run() -> Any:
            from spear_megatron.cli.agents import open_environment

            make, workers = open_environment(config)
            answers: list[Any] = []
            try:
                for environment in [make() for _ in range(episodes)]:
                    try:
                        await environment.reset(Prompt("task", ({"role": "user", "content": "hello"},)))
                        step = await environment.step(Turn(words, (), finished=True))
                        answers.append(step.messages[0]["content"])
                    except RuntimeError as error:
                        answers.append(type(error).__name__)
                return answers
            finally:
                if workers is not None:
                    await workers.close()

        return asyncio.run(run())

    return observe


def after_two_deaths(config: Config, scratch: Path) -> Any:
    """Workers that two episodes lose, or get."""

    async def run() -> Any:
        from spear_megatron.cli.agents import open_environment

        make, workers = open_environment(config)
        assert workers is not None
        ends = []
        for _ in range(2):
            environment = make()
            try:
                await environment.reset(Prompt("task", ({"role": "user", "content": "hello"},)))
                ends.append("reset")
                await environment.step(Turn("die", (), finished=True))
            except RuntimeError as error:
                ends.append(type(error).__name__)
            await environment.close()
        await workers.close()
        return ends

    return asyncio.run(run())


def worker_pids(config: Config, scratch: Path) -> Any:
    """Processes that four episodes live in, and whether this is one of them."""
    pids = with_workers("pid", 4)(config, scratch)
    return len(set(pids)), str(os.getpid()) in pids


_TWO_SLEEPS = programs("import time; time.sleep(0.5)", "import time; time.sleep(0.5)")
_ONE_WORKER = (f"{_SANDBOX}.workers=1",)
_NOBODY_THERE = f"{_SANDBOX}.url=http://127.0.0.1:9"
_REMOTE = (f"{_SANDBOX}.backend=remote", f"{_SANDBOX}.remote_retries=0")
_FILL_DISK = "with open('x', 'wb') as file:\n    for _ in range(6 << 8): file.write(b'x' * 4096)\nprint('written')"
_THREADS = (
    "import threading, time\nthreads = [threading.Thread(target=time.sleep, args=(0.2,)) for _ in range(5)]\n"
    "for thread in threads: thread.start()\nprint('started')"
)
_MODULES = "import sys; print('fractions' in sys.modules)"
_WORKERS = "env.workers"
_OBEDIENT = ("env.name=worker_environments:Obedient", f"{_WORKERS}.backend=process", f"{_WORKERS}.number=1")
OBSERVERS: Observers = {
    f"{_WORKERS}.backend": Observer(worker_pids, ("local", "process"), _OBEDIENT),
    f"{_WORKERS}.number": Observer(worker_pids, ("1", "2"), _OBEDIENT),
    f"{_WORKERS}.timeout_s": Observer(with_workers("sleep 1"), ("60", "0.5"), _OBEDIENT),
    f"{_WORKERS}.start_timeout_s": Observer(with_workers("x"), ("120", "0.001"), _OBEDIENT),
    f"{_WORKERS}.max_restarts": Observer(after_two_deaths, ("20", "0"), _OBEDIENT),
    "env.name": Observer(turn_with_two_calls, ("code_interpreter", "observers.scripted_run:Echo")),
    "env.kwargs": Observer(turn_with_two_calls, ("{{}}", "{{max_calls_per_turn: 1}}")),
    "reward.name": Observer(score, ("math", "observers.environment:Constant")),
    "reward.kwargs": Observer(score, ("{{}}", "{{correct: 2.0}}")),
    f"{_SANDBOX}.backend": Observer(backend, ("auto", "remote"), (_NOBODY_THERE,)),
    f"{_SANDBOX}.memory_mb": Observer(programs("x = bytearray(200 << 20)"), ("1024", "64")),
    f"{_SANDBOX}.cpu_s": Observer(programs("while True: pass"), ("0.2", "0.3")),
    f"{_SANDBOX}.wall_s": Observer(programs("import time; time.sleep(60)"), ("0.3", "0.5"), (f"{_SANDBOX}.cpu_s=0.2",)),
    f"{_SANDBOX}.output_bytes": Observer(programs("print('x' * 1000)"), ("65536", "100")),
    f"{_SANDBOX}.processes": Observer(threads, ("8", "3")),
    f"{_SANDBOX}.disk_mb": Observer(programs(_FILL_DISK), ("32", "2")),
    f"{_SANDBOX}.workers": Observer(_TWO_SLEEPS, ("2", "1"), (f"{_SANDBOX}.queue_s=0.05",)),
    f"{_SANDBOX}.queue_s": Observer(_TWO_SLEEPS, ("60", "0.05"), _ONE_WORKER),
    f"{_SANDBOX}.max_restarts": Observer(after_a_death, ("1", "0")),
    f"{_SANDBOX}.preload": Observer(programs(_MODULES), ("[]", "[fractions]")),
    f"{_SANDBOX}.url": Observer(programs("1"), ("http://127.0.0.1:9", "http://127.0.0.1:9/other"), _REMOTE),
    f"{_SANDBOX}.remote_retries": Observer(programs("1"), ("0", "1"), (_REMOTE[0], _NOBODY_THERE)),
}
