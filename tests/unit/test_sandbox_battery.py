"""What a hostile program may try, on both local backends. After each attempt the same server still serves."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_harness import Driver, driven, forbidden_reason

from spear_megatron.environments.sandbox import ExecutionStatus, SandboxConfig

_LIMITS = dict(memory_mb=256, cpu_s=1.0, output_bytes=65536, processes=8, disk_mb=8, max_restarts=0, preload=())


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = forbidden_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(scope="module")
def shared(backend: str) -> Iterator[Driver]:
    os.environ["SPEAR_TEST_SECRET"] = "hunter2"
    with driven(SandboxConfig(backend=backend, wall_s=30.0, **_LIMITS)) as driver:
        yield driver
    del os.environ["SPEAR_TEST_SECRET"]


@pytest.fixture(scope="module")
def shared_impatient(backend: str) -> Iterator[Driver]:
    with driven(SandboxConfig(backend=backend, wall_s=1.5, **_LIMITS)) as driver:
        yield driver


def _assert_serves(driver: Driver) -> None:
    result = driver.run("print(6 * 7)")
    assert (result.status, result.stdout) == (ExecutionStatus.OK, "42\n"), result
    assert driver.sandbox.num_restarts == 0


@pytest.fixture
def box(shared: Driver) -> Iterator[Driver]:
    """The shared sandbox; fails the test when its server did not survive what the test did."""
    yield shared
    _assert_serves(shared)


@pytest.fixture
def impatient_box(shared_impatient: Driver) -> Iterator[Driver]:
    """The same with a short wall-clock backstop, for programs that would wait for ever."""
    yield shared_impatient
    _assert_serves(shared_impatient)


def _refused(driver: Driver, statement: str) -> str:
    """Run a statement that must raise OSError; returns the name of the exception."""
    code = f"import os, socket\ntry:\n    {statement}\nexcept OSError as error:\n    print(type(error).__name__)\n"
    code += "else:\n    print('ALLOWED')\n"
    result = driver.run(code)
    assert result.status is ExecutionStatus.OK, result
    assert "ALLOWED" not in result.stdout, statement
    return result.stdout.split()[0]


def test_network(box: Driver) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with listener:
        _refused(box, f"socket.create_connection(('127.0.0.1', {port}), timeout=1)")
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()
    for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"):
        _refused(box, f"socket.socket(socket.{family}, socket.SOCK_DGRAM)")


@pytest.mark.parametrize("how", ["read", "write", "list"])
def test_host_files(box: Driver, tmp_path: Path, how: str) -> None:
    tmp_path.chmod(0o777)
    for parent in (tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o666)
    project = Path(__file__).resolve()
    if how == "read":
        for path in (secret, project, "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/self/mem"):
            _refused(box, f"open({str(path)!r}, 'rb').read()")
    elif how == "write":
        for path in (secret, tmp_path / "new", os.__file__, "/usr/x", "/etc/x", "/dev/shm/../x"):
            _refused(box, f"open({str(path)!r}, 'wb')")
        for statement in (f"os.chmod({str(secret)!r}, 0)", f"os.unlink({str(secret)!r})", f"os.utime({str(secret)!r})"):
            _refused(box, statement)
        assert secret.read_text() == "hunter2"
        assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    else:
        for path in (tmp_path, project.parent, "/etc", "/home", "/proc"):
            _refused(box, f"os.listdir({str(path)!r})")


def test_secrets(box: Driver) -> None:
    result = box.run(
        "import gc, os, sys\n"
        "print('SPEAR_TEST_SECRET' in os.environ, sorted(os.environ), sys.argv)\n"
        "print([name for name in sys.modules if 'spear' in name or name.startswith('jail')])\n"
        "open_fds = []\n"
        "for fd in range(256):\n"
        "    try:\n        os.fstat(fd)\n        open_fds.append(fd)\n"
        "    except OSError:\n        pass\n"
        "print(open_fds)\n"
    )
    environment, modules, descriptors = result.stdout.splitlines()
    assert environment.startswith("False ['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR', 'TZ']"), environment
    assert modules == "[]"
    assert descriptors == "[0, 1, 2]"


def test_disk_fill(box: Driver) -> None:
    chunk = "b'x' * (1 << 20)"
    single = box.run(f"with open('f', 'wb') as f:\n    for _ in range(64):\n        f.write({chunk}); f.flush()")
    assert single.status in (ExecutionStatus.ERROR, ExecutionStatus.KILLED), single
    code = f"import time\nfor i in range(64):\n    open(f'f{{i}}', 'wb').write({chunk})\n    time.sleep(0.02)"
    many = box.run(code)
    assert many.status in (ExecutionStatus.ERROR, ExecutionStatus.KILLED), many
    assert "No space left" in many.stderr or "MiB to disk" in many.detail
    fits = box.run(f"open('f', 'wb').write({chunk} * 4)\nprint(len(open('f', 'rb').read()))")
    assert (fits.status, fits.stdout) == (ExecutionStatus.OK, "4194304\n")


def test_disk_use_cannot_be_hidden(box: Driver) -> None:
    """Deleted files, anonymous files and preallocation must count too."""
    code = (
        "import os, time\nheld = []\n"
        "for i in range(40):\n"
        "    fd = os.open(f'f{i}', os.O_CREAT | os.O_RDWR)\n    os.write(fd, b'x' * (1 << 20))\n    held.append(fd)\n"
        "    try:\n        os.unlink(f'f{i}')\n    except OSError:\n        pass\n    time.sleep(0.02)\n"
        "print('HELD')\n"
    )
    assert "HELD" not in box.run(code).stdout
    preallocation = "import os\nos.posix_fallocate(os.open('f', os.O_CREAT | os.O_RDWR), 0, 64 << 20)\nprint('HELD')"
    assert "HELD" not in box.run(preallocation).stdout


def test_many_files_and_folders(box: Driver) -> None:
    code = "import os\nfor i in range(20000):\n    os.makedirs(f'd{i}')\n    os.chdir(f'd{i}')\nprint('HELD')"
    assert "HELD" not in box.run(code).stdout


@pytest.mark.parametrize("code", ["x = bytearray(3 << 30)", "x = []\nwhile True:\n    x.append(bytearray(1 << 20))"])
def test_memory(box: Driver, code: str) -> None:
    result = box.run(code)
    assert result.status is ExecutionStatus.MEMORY, result
    assert "MemoryError" in result.stderr


def test_memory_outside_the_address_space(box: Driver) -> None:
    _refused(box, "os.memfd_create('x')")
    result = box.run("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.shmget(0, 1 << 20, 0o1600))")
    assert result.stdout == "-1\n", result


def test_cpu_loop(box: Driver) -> None:
    result = box.run("print('started')\nwhile True: pass")
    assert result.status is ExecutionStatus.TIMEOUT and "CPU" in result.detail, result
    assert result.stdout == "started\n"


def test_cpu_limit_is_not_wall_time(box: Driver) -> None:
    result = box.run("import time\ntime.sleep(1.3)\nprint('awake')")
    assert (result.status, result.stdout) == (ExecutionStatus.OK, "awake\n")


def test_ignored_signals(box: Driver) -> None:
    code = (
        "import signal\n"
        "for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "while True: pass\n"
    )
    result = box.run(code)
    assert result.status is ExecutionStatus.TIMEOUT, result


def test_sleep(impatient_box: Driver) -> None:
    result = impatient_box.run("import time\nwhile True: time.sleep(100)")
    assert result.status is ExecutionStatus.TIMEOUT and "longer" in result.detail, result
    assert result.duration_s >= 1.5


def test_stopped_process(impatient_box: Driver) -> None:
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(100)"
    assert impatient_box.run(code).status is ExecutionStatus.TIMEOUT


def test_fork_bomb(impatient_box: Driver) -> None:
    result = impatient_box.run("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass")
    assert result.status is ExecutionStatus.TIMEOUT, result
    counted = impatient_box.run(
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0:\n            time.sleep(60)\n"
        "        n += 1\nexcept OSError:\n    print(n)"
    )
    assert counted.status is ExecutionStatus.OK and int(counted.stdout) < 8, counted


def test_thread_bomb(box: Driver) -> None:
    code = "from threading import Event, Thread\nwhile True:\n    Thread(target=Event().wait, daemon=True).start()"
    assert box.run(code).status in (ExecutionStatus.ERROR, ExecutionStatus.TIMEOUT, ExecutionStatus.MEMORY)


def _host_processes_with(marker: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                name = Path(f"/proc/{entry}/comm").read_text().strip()
            except OSError:
                continue
            if name == marker:
                found.append(int(entry))
    return found


def test_daemon(box: Driver) -> None:
    """A twice forked daemon in its own session dies with the program; where forking is refused it never lives."""
    marker = f"daemon{os.getpid()}"
    code = (
        "import ctypes, os, time\n"
        f"ctypes.CDLL(None).prctl(15, b'{marker}', 0, 0, 0)\n"
        "try:\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            os.closerange(0, 3)\n"
        "            time.sleep(60)\n"
        "        os._exit(0)\n"
        "    print('forked')\n"
        "except PermissionError:\n"
        "    print('refused')\n"
        "time.sleep(0.3)\n"
    )
    result = box.run(code)
    expected = "forked\n" if box.sandbox.backend == "namespaces" else "refused\n"
    assert (result.status, result.stdout) == (ExecutionStatus.OK, expected)
    assert _host_processes_with(marker) == []


@pytest.mark.parametrize(
    "target",
    ["-1", "0", "os.getppid()", pytest.param(str(os.getpid()), id="me"), pytest.param(f"-{os.getpgid(0)}", id="us")],
)
def test_kill_others(box: Driver, target: str) -> None:
    code = (
        "import os, signal\n"
        f"for number in (signal.SIGTERM, signal.SIGKILL):\n    try:\n        os.kill({target}, number)\n"
        "    except OSError as error:\n        print('refused')\n"
    )
    result = box.run(code)  # 0 is the group of the program itself, which may die
    assert result.status in (ExecutionStatus.OK, ExecutionStatus.KILLED), result


def test_output_flood(box: Driver) -> None:
    result = box.run("while True: print('x' * 1000)")
    assert result.status is ExecutionStatus.OUTPUT_LIMIT, result.status
    assert len(result.stdout) == 65536 and result.stdout_truncated and not result.stderr_truncated
    errors = box.run("import sys\nsys.stderr.write('y' * 70000)\nprint('done')")
    assert errors.status is ExecutionStatus.OUTPUT_LIMIT
    assert len(errors.stderr) == 65536 and errors.stderr_truncated and not errors.stdout_truncated


def test_nested_namespaces(box: Driver) -> None:
    code = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for flags in (0x10000000, 0x00020000, 0x20000000, 0x40000000):\n"
        "    print(libc.unshare(flags), ctypes.get_errno())\n"
        "print(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None), ctypes.get_errno())\n"
        "print(libc.chroot(b'/'), ctypes.get_errno())\n"
        "print(libc.setuid(0), ctypes.get_errno())\n"
        "print(libc.syscall(56, 0x10000011, 0, 0, 0, 0), ctypes.get_errno())\n"
    )
    result = box.run(code)
    assert result.stdout == "-1 1\n" * 8, result


@pytest.mark.parametrize("program", ["/bin/sh", "/usr/bin/id", "/bin/su"])
def test_host_programs(box: Driver, program: str) -> None:
    assert _refused(box, f"os.execv({program!r}, [{program!r}])") in ("PermissionError", "FileNotFoundError")
    assert box.run(f"import subprocess\nsubprocess.run([{program!r}])").status is ExecutionStatus.ERROR


def test_ptrace_and_foreign_memory(box: Driver) -> None:
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for pid in (1, os.getppid(), {os.getpid()}):\n"
        "    print(libc.ptrace(16, pid, 0, 0), ctypes.get_errno())\n"
        "print(libc.ptrace(0, 0, 0, 0), ctypes.get_errno())\n"
        f"print(libc.process_vm_readv({os.getpid()}, 0, 0, 0, 0, 0), ctypes.get_errno())\n"
    )
    assert box.run(code).stdout == "-1 1\n" * 5


def test_files_do_not_leak(box: Driver) -> None:
    assert box.run("open('left', 'w').write('x')\nimport os\nprint(os.listdir('.'))").stdout == "['left']\n"
    assert box.run("import os\nprint(os.listdir('.'), os.listdir(os.environ['TMPDIR']))").stdout == "[] []\n"


def test_state_does_not_leak(box: Driver) -> None:
    first = box.run(
        "import builtins, json, math, os, random, sys\n"
        "builtins.print_once = 1\nmath.pi = 3\njson.dumps = None\nos.environ['LEFT'] = '1'\nsys.setrecursionlimit(50)\n"
        "random.random()\nsys.path.insert(0, 'left')\nprint('patched')\n"
    )
    assert first.stdout == "patched\n"
    second = box.run(
        "import builtins, json, math, os, sys\n"
        "print(hasattr(builtins, 'print_once'), math.pi > 3.1, json.dumps([]), 'LEFT' in os.environ,\n"
        "      sys.getrecursionlimit() >= 1000, 'left' in sys.path)\n"
    )
    assert second.stdout == "False True [] False True False\n"


def test_programs_that_run_together_do_not_see_each_other(box: Driver) -> None:
    writer = "import os, time\nopen('mine', 'w').write('x')\ntime.sleep(0.5)\nprint(os.listdir('.'))"
    results = box.run_all([writer] * 3)
    assert [result.stdout for result in results] == ["['mine']\n"] * 3


def test_crash(box: Driver) -> None:
    result = box.run("import ctypes\nctypes.string_at(0)")
    assert result.status is ExecutionStatus.KILLED and "SIGSEGV" in result.detail, result
    aborted = box.run("import os\nos.abort()")
    assert aborted.status is ExecutionStatus.KILLED, aborted
