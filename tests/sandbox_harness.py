"""A sandbox driven from synchronous tests, and whether this kernel can offer a backend at all."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from spear_megatron.environments.sandbox import ExecutionResult, SandboxConfig, open_sandbox
from spear_megatron.environments.sandbox.local import LocalSandbox

_T = TypeVar("_T")
_CLONE_NEWUSER_NEWNS = 0x10020000
_SYS_LANDLOCK_CREATE_RULESET, _LANDLOCK_VERSION = 444, 1


class Driver:
    """Runs coroutines of one sandbox on one private event loop."""

    def __init__(self, sandbox: LocalSandbox) -> None:
        self.sandbox = sandbox
        self.loop = asyncio.new_event_loop()

    def wait(self, awaitable: Awaitable[_T], timeout_s: float = 60.0) -> _T:
        """Result of an awaitable; TimeoutError after ``timeout_s``."""

        async def bounded() -> _T:
            return await asyncio.wait_for(awaitable, timeout_s)

        return self.loop.run_until_complete(bounded())

    def run(self, code: str) -> ExecutionResult:
        """Run one program."""
        return self.wait(self.sandbox.run(code))

    def run_all(self, codes: list[str]) -> list[ExecutionResult]:
        """Run programs concurrently."""

        async def gathered() -> list[ExecutionResult]:
            return await asyncio.gather(*(self.sandbox.run(code) for code in codes))

        return self.wait(gathered())


@contextmanager
def driven(config: SandboxConfig) -> Iterator[Driver]:
    """A driver that closes its sandbox."""
    sandbox = open_sandbox(config)
    assert isinstance(sandbox, LocalSandbox)
    driver = Driver(sandbox)
    try:
        yield driver
    finally:
        driver.wait(sandbox.close())
        driver.loop.close()


def _in_child(action: Callable[[], bool]) -> bool:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if action() else 1)
    return os.waitpid(pid, 0)[1] == 0


def forbidden_reason(backend: str) -> str | None:
    """Why the kernel or container forbids a backend, found out without the code under test; None if it does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if backend == "namespaces":

        def mounts_in_namespace() -> bool:
            flags = ctypes.c_ulong(0)
            return libc.unshare(_CLONE_NEWUSER_NEWNS) == 0 and libc.mount(b"x", b"/proc", b"tmpfs", flags, None) == 0

        return None if _in_child(mounts_in_namespace) else "this kernel or container forbids user namespaces"
    arguments = (ctypes.c_long(0), ctypes.c_long(0), ctypes.c_long(_LANDLOCK_VERSION))
    version = libc.syscall(ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET), *arguments)
    return None if version > 0 else "this kernel has no Landlock"
