"""The sandbox as a service: same results, many callers, dead servers, event loops, cancelled callers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_harness import Driver, driven, forbidden_reason

from spear_megatron.environments.sandbox import ExecutionStatus, SandboxConfig, factory, open_sandbox, probe
from spear_megatron.environments.sandbox.local import LocalSandbox


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = forbidden_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(scope="module")
def box(backend: str) -> Iterator[Driver]:
    with driven(SandboxConfig(backend=backend, workers=4)) as driver:
        yield driver


@pytest.fixture
def bare(backend: str) -> Iterator[Driver]:
    """A sandbox of its own for tests that damage it; starts fast."""
    with driven(SandboxConfig(backend=backend, workers=2, wall_s=20, preload=(), max_restarts=2)) as driver:
        yield driver


def _server_pid(driver: Driver) -> int:
    connection = driver.sandbox._connection
    assert connection is not None
    return connection._process._process.pid


_RANDOM_PROGRAM = (
    "import random\nimport numpy\n"
    "print(random.random(), numpy.random.rand(2), hash('text'), {'a', 'b', 'c', 'd'})\n"
)


def test_same_program_same_result(backend: str, box: Driver) -> None:
    first = box.run(_RANDOM_PROGRAM)
    assert first.status is ExecutionStatus.OK, first
    assert box.run(_RANDOM_PROGRAM).stdout == first.stdout
    with driven(SandboxConfig(backend=backend)) as other:
        assert other.run(_RANDOM_PROGRAM).stdout == first.stdout


def test_numpy_and_sympy(box: Driver) -> None:
    code = "import numpy as np\nfrom sympy import *\nx = symbols('x')\nprint(solve(x**2 - 3*x + 2), np.arange(3).sum())"
    assert box.run(code).stdout == "[1, 2] 3\n"


@pytest.mark.parametrize(
    ("code", "status", "stdout", "in_stderr"),
    [
        ("print(1)", ExecutionStatus.OK, "1\n", ""),
        ("", ExecutionStatus.OK, "", ""),
        ("exit()", ExecutionStatus.OK, "", ""),
        ("import sys\nsys.exit(3)", ExecutionStatus.ERROR, "", ""),
        ("raise SystemExit('bye')", ExecutionStatus.ERROR, "", "bye"),
        ("x = (", ExecutionStatus.ERROR, "", "SyntaxError"),
        ("print('\\u00e9\\u4e2d')", ExecutionStatus.OK, "\u00e9\u4e2d\n", ""),
        ("print('\ud800')", ExecutionStatus.ERROR, "", "UnicodeEncodeError"),
        ("a\0b", ExecutionStatus.ERROR, "", "null bytes"),
        ("input()", ExecutionStatus.ERROR, "", "EOFError"),
        ("import os\nos.write(1, b'\\xff')", ExecutionStatus.OK, "\ufffd", ""),
        ("if __name__ == '__main__': print('main')", ExecutionStatus.OK, "main\n", ""),
        ("import asyncio\nasync def f(): return 5\nprint(asyncio.run(f()))", ExecutionStatus.OK, "5\n", ""),
        ("import threading\nthreading.Thread(target=print, args=(7,)).start()", ExecutionStatus.OK, "7\n", ""),
        ("import atexit\natexit.register(print, 8)", ExecutionStatus.OK, "8\n", ""),
        ("from enum import Enum\nclass A(Enum): x = 1\nprint(A.__module__)", ExecutionStatus.OK, "__main__\n", ""),
    ],
)
def test_python_semantics(box: Driver, code: str, status: ExecutionStatus, stdout: str, in_stderr: str) -> None:
    result = box.run(code)
    assert (result.status, result.stdout) == (status, stdout), result
    assert in_stderr in result.stderr


def test_traceback_shows_the_program_alone(box: Driver) -> None:
    result = box.run("import json\ndef parse():\n    return json.loads('{')\n\nparse()\n")
    assert result.status is ExecutionStatus.ERROR
    assert 'File "<program>", line 5' in result.stderr and "return json.loads('{')" in result.stderr
    assert result.stderr.count("File ") == 2 and "JSONDecodeError" in result.stderr


def test_multiprocessing(box: Driver) -> None:
    if box.sandbox.backend != "namespaces":
        pytest.skip("a program is one process without namespaces")
    code = "from multiprocessing import Pool\nwith Pool(2) as pool:\n    print(pool.map(abs, [1, -2]))"
    assert box.run(code).stdout == "[1, 2]\n"


def test_many_callers(box: Driver) -> None:
    results = box.run_all([f"print({i} ** 2)" for i in range(40)])
    assert [result.stdout for result in results] == [f"{i**2}\n" for i in range(40)]


def test_no_more_workers_than_allowed(bare: Driver) -> None:
    """Programs that run at the same time share no clock but the monotonic one: count overlapping intervals."""
    code = "import time\na = time.monotonic()\ntime.sleep(0.3)\nprint(a, time.monotonic())"
    spans = [tuple(map(float, result.stdout.split())) for result in bare.run_all([code] * 5)]
    overlaps = [sum(start <= begin < end for start, end in spans) for begin, _ in spans]
    assert max(overlaps) == 2


def test_event_loop_is_not_blocked(box: Driver) -> None:
    async def ticks_while_running() -> int:
        run = asyncio.ensure_future(box.sandbox.run("import time\ntime.sleep(0.5)"))
        ticks = 0
        while not run.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert box.wait(ticks_while_running()) >= 10


def test_killed_server_is_replaced(bare: Driver) -> None:
    assert bare.run("print(1)").stdout == "1\n"
    pid = _server_pid(bare)

    async def kill_while_running() -> list[object]:
        runs = [asyncio.ensure_future(bare.sandbox.run("import time\ntime.sleep(30)")) for _ in range(2)]
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        return [(await run).status for run in runs]

    started = time.monotonic()
    assert bare.wait(kill_while_running()) == [ExecutionStatus.INFRASTRUCTURE] * 2
    assert time.monotonic() - started < 10
    assert bare.run("print(2)").stdout == "2\n"
    assert bare.sandbox.num_restarts == 1 and _server_pid(bare) != pid


def test_restarts_are_bounded(bare: Driver) -> None:
    assert bare.run("print(1)").status is ExecutionStatus.OK
    for _ in range(3):
        os.kill(_server_pid(bare), signal.SIGKILL)
        bare.wait(asyncio.sleep(0.2))
        result = bare.run("print(1)")
    assert result.status is ExecutionStatus.INFRASTRUCTURE and "max_restarts" in result.detail
    assert bare.sandbox.num_restarts == 2


def test_hung_server_is_noticed(bare: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear_megatron.environments.sandbox.connection._REPORT_GRACE_S", -19.0)
    assert bare.run("print(1)").status is ExecutionStatus.OK
    os.killpg(_server_pid(bare), signal.SIGSTOP)
    result = bare.run("print(2)")
    assert result.status is ExecutionStatus.INFRASTRUCTURE and "did not report" in result.detail
    monkeypatch.undo()
    assert bare.run("print(3)").stdout == "3\n"


@pytest.mark.parametrize("after_s", [0.0, 0.05, 1.0])
def test_cancelled_caller_frees_the_worker(bare: Driver, after_s: float) -> None:
    """Also when it was cancelled while the server started."""

    async def cancel_then_run() -> str:
        runs = [asyncio.ensure_future(bare.sandbox.run("import time\ntime.sleep(15)")) for _ in range(2)]
        await asyncio.sleep(after_s)
        for run in runs:
            run.cancel()
        await asyncio.wait(runs)
        return (await bare.sandbox.run("print('free')")).stdout

    started = time.monotonic()
    assert bare.wait(cancel_then_run()) == "free\n"
    assert time.monotonic() - started < 12
    assert bare.sandbox.num_restarts == 0


def test_waiting_for_a_worker_has_a_deadline(backend: str) -> None:
    with driven(SandboxConfig(backend=backend, workers=1, queue_s=0.2, preload=())) as driver:
        first, second = driver.run_all(["import time\ntime.sleep(1)"] * 2)
        assert first.status is ExecutionStatus.OK
        assert second.status is ExecutionStatus.INFRASTRUCTURE and "waited" in second.detail


def test_closed_sandbox(backend: str) -> None:
    with driven(SandboxConfig(backend=backend, preload=())) as driver:
        assert driver.run("print(1)").status is ExecutionStatus.OK
        pid = _server_pid(driver)
        driver.wait(driver.sandbox.close())
        assert driver.run("print(1)").status is ExecutionStatus.INFRASTRUCTURE
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_new_event_loop_each_time(backend: str) -> None:
    sandbox = open_sandbox(SandboxConfig(backend=backend, preload=()))
    assert isinstance(sandbox, LocalSandbox)
    for _ in range(2):
        assert asyncio.run(sandbox.run("print(1)")).stdout == "1\n"
    asyncio.run(sandbox.close())
    assert sandbox.num_restarts == 0


def test_nothing_survives_the_client(backend: str, tmp_path: Path) -> None:
    """A trainer killed by SIGKILL leaves no process and no folder behind."""
    code = (
        "import asyncio, sys\n"
        "from spear_megatron.environments.sandbox import SandboxConfig, open_sandbox\n"
        "async def main():\n"
        f"    box = open_sandbox(SandboxConfig(backend={backend!r}, preload=()))\n"
        "    await box.run('print(1)')\n"
        "    print(box._connection._process._process.pid, flush=True)\n"
        "    await box.run('import time; time.sleep(25)')\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert client.stdout is not None
    server_group = int(client.stdout.readline())
    client.kill()
    client.wait()
    client.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not Path(f"/proc/{server_group}").exists() and not any(tmp_path.glob("spear-sandbox-*")):
            return
        time.sleep(0.05)
    pytest.fail("the sandbox outlived its client")


def test_auto_prefers_namespaces_and_never_runs_unsandboxed(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"namespaces": None, "landlock": None}
    monkeypatch.setattr(factory, "try_backend", lambda backend: reasons[backend])
    assert open_sandbox(SandboxConfig()).backend == "namespaces"
    reasons["namespaces"] = "EPERM"
    assert open_sandbox(SandboxConfig()).backend == "landlock"
    reasons["landlock"] = "ENOSYS"
    with pytest.raises(ValueError, match=r"namespaces \(EPERM\); landlock \(ENOSYS\)"):
        open_sandbox(SandboxConfig())
    with pytest.raises(ValueError, match="EPERM"):
        open_sandbox(SandboxConfig(backend="namespaces"))


def test_probe_agrees_with_the_kernel() -> None:
    for result in probe():
        assert result.available == (forbidden_reason(result.backend) is None), result
        assert result.available == (result.reason == "")


def test_the_kernel_ends_programs_before_the_trainer(bare: Driver) -> None:
    """When memory runs out, the victim is the process with the highest score."""
    assert bare.run("print(1)").status is ExecutionStatus.OK
    assert Path(f"/proc/{_server_pid(bare)}/oom_score_adj").read_text() == "1000\n"
