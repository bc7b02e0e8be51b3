"""The few Linux calls that Python's standard library lacks, through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import time
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x04000000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
CAP_SYS_ADMIN = 21
# The numbers above 423 are the same on every architecture.
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 0x8000, 1
_AT_FDCWD = -100


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def machine() -> str:
    """Architecture name.

    Raises:
        OSError: on an architecture whose system call numbers are not known here.
    """
    name = platform.machine()
    if name not in _SYS_PIVOT_ROOT:
        raise OSError(f"the local sandbox knows x86_64 and aarch64, not {name}")
    return name


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def syscall(number: int, *arguments: Any, what: str) -> int:
    """Raw system call; every integer is passed as a C long.

    Raises:
        OSError: with the errno and ``what``.
    """
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc().syscall(ctypes.c_long(number), *passed), what)


def prctl(option: int, value: int = 0, pointer: Any = 0) -> int:
    """``prctl(2)``; raises OSError on failure."""
    third = ctypes.c_ulong(pointer) if isinstance(pointer, int) else pointer
    result = _libc().prctl(option, ctypes.c_ulong(value), third, ctypes.c_ulong(0), ctypes.c_ulong(0))
    return _check(result, f"prctl {option}")


def unshare(flags: int) -> None:
    """``unshare(2)``: move this process into new namespaces."""
    _check(_libc().unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """``setns(2)``: enter the namespace behind ``fd``."""
    _check(_libc().setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """``mount(2)``."""
    result = _libc().mount(
        source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data and data.encode()
    )
    _check(result, f"mount {target}")


def bind(source: str, target: str, *, read_only: bool = True) -> None:
    """Bind-mount ``source`` with everything mounted below it on ``target``."""
    mount(source, target, None, MS_BIND | MS_REC)
    if read_only:
        attributes = _MountAttributes(attr_set=_MOUNT_ATTR_RDONLY)
        size = ctypes.sizeof(attributes)
        what = f"mount_setattr {target} (Linux 5.12 or newer)"
        path = ctypes.c_char_p(target.encode())
        syscall(SYS_MOUNT_SETATTR, _AT_FDCWD, path, _AT_RECURSIVE, ctypes.byref(attributes), size, what=what)


def pivot_root(new_root: str, put_old: str) -> None:
    """Make the mount point ``new_root`` the root and mount the old root on ``put_old`` below it."""
    paths = [ctypes.c_char_p(path.encode()) for path in (new_root, put_old)]
    syscall(_SYS_PIVOT_ROOT[machine()], *paths, what="pivot_root")
    os.chdir("/")


def unmount(path: str) -> None:
    """Detach the mount at ``path`` with all below it."""
    _check(_libc().umount2(path.encode(), _MNT_DETACH), f"umount2 {path}")


def effective_capabilities() -> int:
    """Bit set of the effective capabilities of this process."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def drop_capabilities() -> None:
    """Give up every capability for good, also those that a later exec could restore."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # EINVAL above the last capability, EPERM without CAP_SETPCAP: nothing left to drop
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    syscall(_SYS_CAPSET[machine()], header, data, what="capset")


def become(uid: int) -> None:
    """Turn a root process into ``uid`` for good, without supplementary groups."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    prctl(PR_SET_DUMPABLE, 1)  # the change of uid cleared it, and /proc/self would belong to root


def die_with_parent() -> None:
    """Have the kernel send SIGKILL to this process when the process that forked it dies."""
    prctl(PR_SET_PDEATHSIG, 9)


def process_cpu_s(pid: int) -> float:
    """CPU seconds of all threads of another process (its children not included)."""
    return time.clock_gettime((~pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
