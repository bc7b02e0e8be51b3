"""What a code sandbox offers: run one program, get one typed result. Failures are results, not exceptions."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class ExecutionStatus(str, enum.Enum):
    """How a program ended."""

    OK = "ok"  # exit code 0
    ERROR = "error"  # uncaught exception or another exit code
    TIMEOUT = "timeout"  # CPU limit, or the wall-clock backstop
    MEMORY = "memory"  # uncaught MemoryError
    OUTPUT_LIMIT = "output_limit"  # wrote more than the limit; what fits is kept
    KILLED = "killed"  # died by a signal, or stopped for its use of the disk
    INFRASTRUCTURE = "infrastructure"  # the sandbox failed, not the program: says nothing about the program


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionResult:
    """Outcome of one program.

    ``stdout`` and ``stderr`` are decoded as UTF-8 (undecodable bytes replaced) and cut at the output limit; the flags
    say whether something was cut. ``duration_s`` is wall time inside the sandbox. ``detail`` names the limit, signal or
    failure behind a status other than ``ok`` and ``error``.
    """

    status: ExecutionStatus
    stdout: str = ""
    stderr: str = ""
    duration_s: float = 0.0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    detail: str = ""


@runtime_checkable
class Sandbox(Protocol):
    """Runs model-written Python programs, each isolated from the host and from all others."""

    async def run(self, code: str) -> ExecutionResult:
        """Run ``code`` as ``__main__``. Never raises for what the program does or for a failing sandbox."""
        ...

    async def close(self) -> None:
        """Stop every program and free what the sandbox holds. Runs that still wait end as ``infrastructure``."""
        ...


def infrastructure(detail: str) -> ExecutionResult:
    """The result of a run that failed through no fault of the program."""
    return ExecutionResult(status=ExecutionStatus.INFRASTRUCTURE, detail=detail)
