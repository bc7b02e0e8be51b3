"""Configuration errors, that every limit takes effect, and the system call filter, run through a BPF interpreter."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from sandbox_harness import driven, forbidden_reason

from spear_megatron.environments.sandbox import ExecutionStatus, SandboxConfig
from spear_megatron.environments.sandbox.jail import seccomp, syscalls
from spear_megatron.environments.sandbox.jail.settings import Settings

_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", "docker"),
        ("memory_mb", 0),
        ("memory_mb", 1.5),
        ("cpu_s", -1),
        ("cpu_s", float("nan")),
        ("wall_s", True),
        ("wall_s", 1.0),
        ("output_bytes", "64k"),
        ("processes", 0),
        ("disk_mb", None),
        ("workers", 0),
        ("queue_s", 0),
        ("max_restarts", -1),
        ("remote_retries", -1),
        ("preload", ("import os",)),
        ("preload", (3,)),
    ],
)
def test_bad_values(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"env\.sandbox\.{key} ") as error:
        SandboxConfig(**{key: value})
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("url", [None, "", "host:8080", "ftp://host"])
def test_remote_needs_an_address(url: str | None) -> None:
    with pytest.raises(ValueError, match=r"env\.sandbox\.url"):
        SandboxConfig(backend="remote", url=url)


def test_settings_survive_json() -> None:
    settings = Settings(
        backend="landlock",
        memory_mb=1,
        cpu_s=0.5,
        wall_s=2.0,
        output_bytes=3,
        processes=4,
        disk_mb=5,
        preload=("numpy",),
        packages=("/a",),
        scratch="/tmp",
    )
    assert Settings.from_json(settings.to_json()) == settings


_HOLD = "x = bytearray(200 << 20)"
_SPIN = "import time\nwhile time.process_time() < 0.8: pass"
_FORK = "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        time.sleep(9)"


@pytest.mark.parametrize(
    ("code", "small", "large", "status"),
    [
        (_HOLD, {"memory_mb": 100}, {"memory_mb": 400}, ExecutionStatus.MEMORY),
        (_SPIN, {"cpu_s": 0.3}, {"cpu_s": 20.0}, ExecutionStatus.TIMEOUT),
        ("import time\ntime.sleep(1)", {"wall_s": 0.5, "cpu_s": 0.4}, {}, ExecutionStatus.TIMEOUT),
        ("print('x' * 5000)", {"output_bytes": 1000}, {"output_bytes": 6000}, ExecutionStatus.OUTPUT_LIMIT),
        (_FORK, {"processes": 2}, {"processes": 6}, ExecutionStatus.ERROR),
        ("open('f', 'wb').write(b'x' * (3 << 20))", {"disk_mb": 2}, {"disk_mb": 5}, ExecutionStatus.ERROR),
    ],
)
def test_every_limit_decides(code: str, small: dict[str, Any], large: dict[str, Any], status: ExecutionStatus) -> None:
    reason = forbidden_reason("namespaces")
    if reason is not None:
        pytest.skip(reason)
    for limits, expected in ((small, status), (large, ExecutionStatus.OK)):
        with driven(SandboxConfig(backend="namespaces", preload=(), **limits)) as driver:
            assert driver.run(code).status is expected, limits


def test_preload_decides_what_is_loaded_before_the_program() -> None:
    code = "import sys\nprint('fractions' in sys.modules)"
    for preload, expected in (((), "False\n"), (("fractions", "no_such_module"), "True\n")):
        with driven(SandboxConfig(preload=preload)) as driver:
            assert driver.run(code).stdout == expected
            assert driver.sandbox._connection is not None
            assert driver.sandbox._connection.preloaded == tuple(name for name in preload if name == "fractions")


def _decide(program: bytes, arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel would answer: an interpreter of the four kinds of instruction in use."""
    six = [value & (2**64 - 1) for value in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *six)
    position, register = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * position)
        position += 1
        if code == 0x06:
            return value
        if code == 0x20:
            register = struct.unpack_from("=I", data, value)[0]
            continue
        holds = {0x15: register == value, 0x25: register > value, 0x45: bool(register & value)}[code]
        position += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("namespaces", [True, False])
def test_filter_refuses_what_the_tables_say(machine: str, namespaces: bool) -> None:
    program = seccomp.build(namespaces=namespaces, pid=77, machine=machine)
    column, arch = _COLUMN[machine], _ARCH[machine]
    extra = {} if namespaces else syscalls.DENIED_WITHOUT_NAMESPACES
    for name, numbers in {**syscalls.DENIED, **extra}.items():
        if numbers[column] is not None:
            assert _decide(program, arch, numbers[column]) == _ERRNO | errno.EPERM, name
    assert _decide(program, arch, 435) == _ERRNO | errno.ENOSYS
    assert _decide(program, arch, 600) == _ERRNO | errno.ENOSYS
    assert _decide(program, arch, 0x40000000 + 41) == _ERRNO | errno.ENOSYS
    assert _decide(program, 0x40000003, 11) == _KILL
    for name, numbers in {"read": (0, 63), "write": (1, 64), "mmap": (9, 222), "futex": (202, 98)}.items():
        assert _decide(program, arch, numbers[column]) == _ALLOW, name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("namespaces", [True, False])
def test_filter_looks_at_arguments(machine: str, namespaces: bool) -> None:
    program = seccomp.build(namespaces=namespaces, pid=77, machine=machine)
    column, arch = _COLUMN[machine], _ARCH[machine]
    refused = _ERRNO | errno.EPERM

    def decide(numbers: tuple[int | None, int | None], *arguments: int) -> int:
        number = numbers[column]
        assert number is not None
        return _decide(program, arch, number, arguments)

    thread, process = 0x003D0F00, 0x01200011
    assert decide(syscalls.CLONE, thread) == _ALLOW
    assert decide(syscalls.CLONE, process) == (_ALLOW if namespaces else refused)
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(syscalls.CLONE, thread | flag) == refused
    assert decide(syscalls.PRCTL, 1) == refused
    assert decide(syscalls.PRCTL, 15) == _ALLOW
    assert decide(syscalls.PRLIMIT, 0) == _ALLOW
    assert decide(syscalls.PRLIMIT, 78) == refused
    for call in (syscalls.KILL, syscalls.TGKILL, syscalls.TKILL):
        assert decide(call, 77) == _ALLOW
        for target in (78, 0, -1, -77):
            assert decide(call, target) == (_ALLOW if namespaces else refused)
    if not namespaces:
        assert decide(syscalls.OPENAT, -100, 0, 0x00410002) == _ERRNO | errno.EOPNOTSUPP
        assert decide(syscalls.FALLOCATE, 3) == _ERRNO | errno.EOPNOTSUPP
    assert decide(syscalls.OPENAT, -100, 0, 0x00080000) == _ALLOW


@pytest.mark.parametrize(
    ("header", "pattern", "column"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+) (\d+)", 0),
        ("/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+) (\d+)", 1),
    ],
)
def test_numbers_agree_with_the_kernel_headers(header: str, pattern: str, column: int) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    known = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text())}
    tables = (
        syscalls.DENIED,
        syscalls.DENIED_WITHOUT_NAMESPACES,
        syscalls.HIDDEN,
        syscalls.HIDDEN_WITHOUT_NAMESPACES,
        {"clone": syscalls.CLONE, "prctl": syscalls.PRCTL, "prlimit64": syscalls.PRLIMIT, "kill": syscalls.KILL},
        {"tkill": syscalls.TKILL, "tgkill": syscalls.TGKILL, "openat": syscalls.OPENAT, "fcntl": syscalls.FCNTL},
        {"rt_sigqueueinfo": syscalls.RT_SIGQUEUEINFO, "rt_tgsigqueueinfo": syscalls.RT_TGSIGQUEUEINFO},
        {"fallocate": syscalls.FALLOCATE},
    )
    compared = 0
    for table in tables:
        for name, numbers in table.items():
            if name in known:
                assert numbers[column] == known[name], name
                compared += 1
    assert compared > 90
