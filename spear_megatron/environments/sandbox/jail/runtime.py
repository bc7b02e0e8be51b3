"""The Python runtime a program may read, and the resources it may use."""

from __future__ import annotations

import gc
import importlib
import os
import resource
import site
import sys
import sysconfig
from collections.abc import Iterable

from .settings import Settings

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC0", "OMP_NUM_THREADS": "1"}
# What these modules import at first use.
_LAZY_PARTS = {
    "numpy": ("numpy.random", "numpy.linalg", "numpy.fft", "numpy.polynomial"),
    "sympy": ("sympy.core.random",),
}
_MAX_OPEN_FILES = 64
_MAX_PENDING_SIGNALS = 256


def preload(names: Iterable[str]) -> list[str]:
    """Import modules for all programs to come; those that are not installed are left out. Returns what was loaded."""
    loaded = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name + ".").startswith(error.name + "."):
                raise
        else:
            loaded.append(name)
    for name in loaded:
        for part in _LAZY_PARTS.get(name, ()):
            importlib.import_module(part)
    if "sympy" in loaded:
        import sympy

        sympy.solve(sympy.Symbol("x") ** 2 - 1)  # imports what sympy imports at first use
    gc.collect()
    gc.freeze()  # keeps the collector of a program from copying the pages of the preloaded modules
    return loaded


def start_interpreter(packages: Iterable[str]) -> None:
    """Do what the module ``site`` does at a normal start, but for its path files: those may lead to host files."""
    site.setquit()
    site.setcopyright()
    site.sethelper()
    sys.path += packages


def _library_folders() -> set[str]:
    """Folders of the shared libraries in this process; modules that are imported later find theirs there, too."""
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if ".so" in line}
    return {os.path.dirname(path) for path in files if path.startswith("/")} - {"/"}


def folders(packages: Iterable[str]) -> list[str]:
    """Real paths of all folders of the runtime, ``packages`` among them, none below another."""
    wanted = {os.path.dirname(os.__file__), sysconfig.get_path("platstdlib"), *packages} | _library_folders()
    existing = {os.path.realpath(path) for path in wanted if os.path.isdir(path)}
    if os.path.isdir("/usr/share/zoneinfo"):
        existing.add("/usr/share/zoneinfo")
    result: list[str] = []
    for path in sorted(existing):
        if not any(path.startswith(parent + "/") for parent in result):
            result.append(path)
    return result


def devices() -> list[str]:
    """The device files of this machine that a program may use."""
    return [path for path in _DEVICES if os.path.exists(path)]


def address_space_bytes() -> int:
    """Virtual size of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def limit_resources(settings: Settings, address_space: int) -> None:
    """Set the resource limits of a program; ``address_space`` is the virtual size before the program starts."""
    cpu = int(settings.cpu_s) + 2  # behind the server, which stops the program itself at ``cpu_s``
    disk = settings.disk_mb << 20
    limits = [
        (resource.RLIMIT_AS, address_space + (settings.memory_mb << 20)),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, _MAX_PENDING_SIGNALS),
        (resource.RLIMIT_RTPRIO, 0),
    ]
    if settings.backend == "namespaces":  # elsewhere it would count all processes of the user
        limits.append((resource.RLIMIT_NPROC, settings.processes))
    for kind, value in limits:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
