"""Seccomp: a filter on system calls, assembled here as classic BPF and loaded with prctl."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from . import linux, syscalls

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_MODE_FILTER = 2
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16

# namespaces, and CLONE_UNTRACED
_CLONE_FORBIDDEN = 0x7E020000 | 0x00800000
_CLONE_THREAD = 0x00010000
_O_TMPFILE = 0x00400000
_F_SETLEASE, _F_NOTIFY = 1024, 1026

Numbers = tuple[int | None, int | None]


@dataclass(frozen=True)
class _ArgumentRule:
    """Answer ``error`` when ``argument`` (its low 32 bits) compares with ``value``: any, none (of the bits), eq, ne."""

    call: Numbers
    argument: int
    test: str
    value: int
    error: int = errno.EPERM


def _argument_rules(namespaces: bool, pid: int) -> list[_ArgumentRule]:
    rules = [
        _ArgumentRule(syscalls.CLONE, 0, "any", _CLONE_FORBIDDEN),
        _ArgumentRule(syscalls.PRCTL, 0, "eq", linux.PR_SET_PDEATHSIG),
        _ArgumentRule(syscalls.PRCTL, 0, "eq", linux.PR_SET_DUMPABLE),
        _ArgumentRule(syscalls.PRLIMIT, 0, "ne", 0),
    ]
    if namespaces:
        return rules
    to_self = (
        syscalls.KILL,
        syscalls.TKILL,
        syscalls.TGKILL,
        syscalls.RT_SIGQUEUEINFO,
        syscalls.RT_TGSIGQUEUEINFO,
    )
    rules += [_ArgumentRule(call, 0, "ne", pid) for call in to_self]
    return rules + [
        _ArgumentRule(syscalls.CLONE, 0, "none", _CLONE_THREAD),
        _ArgumentRule(syscalls.OPEN, 1, "any", _O_TMPFILE, errno.EOPNOTSUPP),
        _ArgumentRule(syscalls.OPENAT, 2, "any", _O_TMPFILE, errno.EOPNOTSUPP),
        _ArgumentRule(syscalls.FALLOCATE, 0, "ne", 0xFFFFFFFF, errno.EOPNOTSUPP),
        _ArgumentRule(syscalls.FCNTL, 1, "eq", _F_SETLEASE),
        _ArgumentRule(syscalls.FCNTL, 1, "eq", _F_NOTIFY),
    ]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


def _test(rule: _ArgumentRule) -> bytes:
    """Load the argument, answer the error when the test holds, else go on behind."""
    answer = _instruction(_RETURN, _ERRNO | rule.error)
    jump = {
        "any": _instruction(_JUMP_SET, rule.value, 0, 1),
        "none": _instruction(_JUMP_SET, rule.value, 1, 0),
        "eq": _instruction(_JUMP_EQUAL, rule.value, 0, 1),
        "ne": _instruction(_JUMP_EQUAL, rule.value, 1, 0),
    }[rule.test]
    return _instruction(_LOAD, _ARGUMENTS_OFFSET + 8 * rule.argument) + jump + answer


def _refuse(numbers: Iterable[Numbers], column: int, error: int) -> bytes:
    answer = _instruction(_RETURN, _ERRNO | error)
    known = [pair[column] for pair in numbers]
    return b"".join(_instruction(_JUMP_EQUAL, number, 0, 1) + answer for number in known if number is not None)


def build(*, namespaces: bool, pid: int, machine: str | None = None) -> bytes:
    """The filter as an array of ``struct sock_filter`` (8 bytes each).

    Args:
        namespaces: the program lives in its own namespaces and may fork and signal what is in there.
        pid: process that will load the filter; without namespaces the only one that it may signal.
        machine: x86_64 or aarch64; None is this machine.
    """
    machine = machine or linux.machine()
    column = _COLUMN[machine]
    denied = list(syscalls.DENIED.values())
    hidden = list(syscalls.HIDDEN.values())
    if not namespaces:
        denied += syscalls.DENIED_WITHOUT_NAMESPACES.values()
        hidden += syscalls.HIDDEN_WITHOUT_NAMESPACES.values()
    program = [
        _instruction(_LOAD, _ARCH_OFFSET),
        _instruction(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_OFFSET),
        _instruction(_JUMP_GREATER, syscalls.LAST_KNOWN, 0, 1),  # also catches x32
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
        _refuse(denied, column, errno.EPERM),
        _refuse(hidden, column, errno.ENOSYS),
    ]
    rules: dict[int, bytes] = {}
    for rule in _argument_rules(namespaces, pid):
        number = rule.call[column]
        if number is not None:
            rules[number] = rules.get(number, b"") + _test(rule)
    for number, tests in rules.items():
        body = tests + _instruction(_RETURN, _ALLOW)
        program += [_instruction(_JUMP_EQUAL, number, 0, len(body) // 8), body]
    program.append(_instruction(_RETURN, _ALLOW))
    return b"".join(program)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def load(program: bytes) -> None:
    """Put the filter on this thread and all that it starts, for ever.

    Raises:
        OSError: seccomp filters are not available.
    """
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    reference = ctypes.byref(_Program(length=len(program) // 8, filter=program))
    linux.prctl(linux.PR_SET_SECCOMP, _MODE_FILTER, reference)
