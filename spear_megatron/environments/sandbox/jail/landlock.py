"""Landlock: confine a process to a set of folders, without mounts or privileges (Linux 5.13 or newer)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from . import linux

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_REG, TRUNCATE = 1 << 8, 1 << 14
# All file rights by version of the interface: 1-12 in version 1, REFER in 2, TRUNCATE in 3, IOCTL_DEV in 5.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_RIGHTS = 0b11  # bind and connect of TCP sockets, version 4
_SCOPES = 0b11  # abstract unix sockets and signals, version 6
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def abi() -> int:
    """Version of Landlock in this kernel.

    Raises:
        OSError: Landlock is not built in (ENOSYS) or not enabled (EOPNOTSUPP).
    """
    return linux.syscall(linux.SYS_LANDLOCK_CREATE, 0, 0, _VERSION_FLAG, what="Landlock")


def _ruleset(version: int) -> int:
    rules = _Ruleset(fs=_FILE_RIGHTS[min(version, 5)])
    size = 8
    if version >= 4:
        rules.net, size = _NET_RIGHTS, 16
    if version >= 6:
        rules.scoped, size = _SCOPES, 24
    return linux.syscall(linux.SYS_LANDLOCK_CREATE, ctypes.byref(rules), size, 0, what="landlock_create_ruleset")


def _allow(ruleset: int, path_fd: int, rights: int) -> None:
    rule = _PathBeneath(allowed=rights, parent_fd=path_fd)
    reference = ctypes.byref(rule)
    linux.syscall(linux.SYS_LANDLOCK_ADD, ruleset, _RULE_PATH_BENEATH, reference, 0, what="landlock_add_rule")


def restrict(version: int, readable: Iterable[int], devices: Iterable[int], scratch: str) -> None:
    """Confine this process and its descendants for ever.

    Args:
        version: result of ``abi()``.
        readable: open folder descriptors below which everything may be read.
        devices: open descriptors of device files that may be read and written.
        scratch: folder in which regular files may be made, read and written, but neither deleted nor renamed and no
            folders made: so one flat listing shows all the space that a program holds.
    """
    ruleset = _ruleset(version)
    for fd in readable:
        _allow(ruleset, fd, READ_FILE | READ_DIR)
    for fd in devices:
        _allow(ruleset, fd, READ_FILE | WRITE_FILE)
    truncate = TRUNCATE if version >= 3 else 0
    fd = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _allow(ruleset, fd, READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | truncate)
    os.close(fd)
    linux.syscall(linux.SYS_LANDLOCK_RESTRICT, ruleset, 0, what="landlock_restrict_self")
    os.close(ruleset)
