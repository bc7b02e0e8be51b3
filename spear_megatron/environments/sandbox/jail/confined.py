"""Backend of Landlock, seccomp and resource limits, for machines that forbid namespaces (most containers do).

Nothing bounds and reaps the children of a program without a pid namespace, so a program is one process (threads are
allowed). It may create, read and write files in one flat folder on disk, but not delete them: what it holds can then
be measured while it runs. Otherwise programs see no difference.
"""

from __future__ import annotations

import os
import shutil
import tempfile

from . import landlock, linux, runtime, seccomp
from .settings import Settings

_NOBODY = 65534


class LandlockJail:
    """Holds the server's side; ``confine`` runs in each forked child."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._version = landlock.abi()
        self._address_space = runtime.address_space_bytes()
        self._readable: list[int] = []
        self._devices: list[int] = []
        self._root = ""

    def enter(self) -> None:
        """Prepare the server. As root it takes another identity where that one can still read the runtime."""
        folders = runtime.folders(self._settings.packages)
        if os.geteuid() == 0:
            if _readable_as(_NOBODY, folders):
                linux.become(_NOBODY)
            else:
                linux.drop_capabilities()
        flags = os.O_PATH | os.O_CLOEXEC
        self._readable = [os.open(path, flags) for path in folders]
        self._devices = [os.open(path, flags) for path in runtime.devices()]
        self._root = tempfile.mkdtemp(prefix="spear-sandbox-", dir=self._settings.scratch)

    @property
    def scratch_root(self) -> str:
        """Folder on disk that holds the scratch folders of all runs."""
        return self._root

    def fork(self) -> int:
        """``os.fork``."""
        return os.fork()

    def make_scratch(self, run_id: int) -> str:
        """Make and return the scratch folder of a run."""
        path = os.path.join(self._root, str(run_id))
        os.mkdir(path, 0o700)
        return path

    def confine(self, scratch: str) -> None:
        """Isolate this process, just forked, for good."""
        os.chdir(scratch)
        runtime.limit_resources(self._settings, self._address_space)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(self._version, self._readable, self._devices, scratch)
        seccomp.load(seccomp.build(namespaces=False, pid=os.getpid()))

    def disk_bytes(self, scratch: str) -> int:
        """Space that the files of a run take on disk, a block counted for each file."""
        with os.scandir(scratch) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 + 4096 for entry in entries)

    def remove_scratch(self, scratch: str) -> None:
        """Delete the scratch folder of a finished run."""
        shutil.rmtree(scratch, ignore_errors=True)

    def leave(self) -> None:
        """Delete all scratch folders."""
        shutil.rmtree(self._root, ignore_errors=True)


def _readable_as(uid: int, folders: list[str]) -> bool:
    """Whether another user can list all these folders; tried in a child, which takes the identity for good."""
    child = os.fork()
    if child == 0:
        try:
            linux.become(uid)
            for path in folders:
                os.listdir(path)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
