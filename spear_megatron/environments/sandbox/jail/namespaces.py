"""Backend of user, mount, pid, network, IPC and UTS namespaces. Needs no root and no helper program.

The server enters its own set of namespaces once: a root file system with nothing but the Python runtime, no network,
its own processes. Each program then gets another user, pid and mount namespace below it: process 1 of its own world,
an empty scratch folder in memory, a process count of its own, and no capability.
"""

from __future__ import annotations

import os
import signal

from . import linux, runtime, seccomp
from .settings import Settings

WORK = "/run/work"  # a place where no Python runtime lies: what is mounted there would hide it
_NOBODY = 65534
_INSIDE_UID = 1000
_MAX_FILES = 4096
_OLD_ROOT = "/.old"


def _write_maps(proc: int, outside_uid: int, outside_gid: int) -> None:
    """Map the one outer user and group to 1000 in the user namespace just made."""
    texts = {
        "setgroups": "deny",
        "uid_map": f"{_INSIDE_UID} {outside_uid} 1",
        "gid_map": f"{_INSIDE_UID} {outside_gid} 1",
    }
    for name, text in texts.items():
        fd = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _build_root(folders: list[str]) -> None:
    """Make a read-only root of the runtime alone and move there; the host's files are then out of reach."""
    devices = runtime.devices()
    links = {path: os.readlink(path) for path in ("/lib", "/lib64") if os.path.islink(path)}
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    # Any folder will do, as only this mount namespace sees it: one in which no runtime can lie.
    linux.mount("tmpfs", "/proc", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    os.mkdir("/proc" + _OLD_ROOT)
    linux.pivot_root("/proc", "/proc" + _OLD_ROOT)
    for path in folders:
        os.makedirs(path, exist_ok=True)
        linux.bind(_OLD_ROOT + path, path)
    for path, target in links.items():
        os.symlink(target, path)
    os.mkdir("/dev")
    for path in devices:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        linux.bind(_OLD_ROOT + path, path, read_only=False)
    os.makedirs(WORK)
    for path in ("/tmp", "/dev/shm"):
        if not os.path.exists(path):  # a runtime can lie below /tmp; programs then rely on TMPDIR
            os.symlink(WORK, path)
    linux.unmount(_OLD_ROOT)
    os.rmdir(_OLD_ROOT)
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("none", "/", None, flags)


class NamespaceJail:
    """Holds the server's side; ``confine`` runs in each forked child."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._address_space = runtime.address_space_bytes()
        self._pid_namespace = -1
        self._filter = b""

    def enter(self) -> None:
        """Move this process, which becomes the server, into its namespaces. Returns in a forked child only.

        Raises:
            OSError: what the kernel, its policy or the container refused.
        """
        folders = runtime.folders(self._settings.packages)
        flags = linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
        root = os.geteuid() == 0
        mounts_as_root = root and bool(linux.effective_capabilities() >> linux.CAP_SYS_ADMIN & 1)
        if mounts_as_root:  # an interpreter below root's private home can be bound, but not reached as another user
            linux.unshare(linux.CLONE_NEWNS)
            _build_root(folders)
        if root:
            linux.become(_NOBODY)  # the kernel does not hold the real root to its limit of processes
        uid, gid = os.getuid(), os.getgid()
        linux.unshare(flags | (0 if mounts_as_root else linux.CLONE_NEWNS))
        _write_maps(self._proc, uid, gid)
        if not mounts_as_root:
            _build_root(folders)
        self._fork_server()
        self._pid_namespace = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        self._filter = seccomp.build(namespaces=True, pid=0)

    def _fork_server(self) -> None:
        """Become process 1 of the new pid namespace; the outer process only waits, and takes all down if it dies."""
        child = os.fork()
        if child == 0:
            linux.die_with_parent()
            return
        os.closerange(0, 1 << 16)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _, status = os.waitpid(child, 0)
        os._exit(0 if os.waitstatus_to_exitcode(status) == 0 else 1)

    def fork(self) -> int:
        """Fork as process 1 of a new pid namespace. Returns what ``os.fork`` returns.

        Raises:
            OSError: the kernel has no room for another process or namespace.
        """
        linux.unshare(linux.CLONE_NEWPID)
        try:
            pid = os.fork()
        except OSError:
            self._leave_pid_namespace()
            raise
        if pid != 0:
            self._leave_pid_namespace()
        return pid

    def _leave_pid_namespace(self) -> None:
        """Without this the server could make no further namespace: it may only do so from its own."""
        linux.setns(self._pid_namespace, linux.CLONE_NEWPID)

    def make_scratch(self, run_id: int) -> str:
        """The folder of a run; its memory file system is mounted by ``confine``."""
        return WORK

    def disk_bytes(self, scratch: str) -> int:
        """Nothing to watch from outside: the memory file system of a run has a fixed size."""
        return 0

    def remove_scratch(self, scratch: str) -> None:
        """Nothing to delete: the memory file system goes with its namespace."""

    def leave(self) -> None:
        """Nothing to clean up on the host."""

    @property
    def scratch_root(self) -> str:
        """Empty: there is no folder on the host."""
        return ""

    def confine(self, scratch: str) -> None:
        """Isolate this process, just forked, for good."""
        linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS)
        _write_maps(self._proc, _INSIDE_UID, _INSIDE_UID)
        size = f"size={self._settings.disk_mb}m,nr_inodes={_MAX_FILES},mode=700"
        linux.mount("tmpfs", scratch, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, size)
        os.chdir(scratch)
        runtime.limit_resources(self._settings, self._address_space)
        linux.drop_capabilities()
        seccomp.load(self._filter)
