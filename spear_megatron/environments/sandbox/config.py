"""Limits and choice of backend of the code sandbox (config section ``env.sandbox``)."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("auto", "namespaces", "landlock", "remote")


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """What one program may use and where it runs.

    Attributes:
        backend: ``auto`` takes ``namespaces`` where the kernel allows them, else ``landlock``; ``remote`` is a
            SandboxFusion service at ``url``. Code never runs unsandboxed.
        memory_mb: address space that each process of a program may add to the preloaded interpreter, in MiB.
        cpu_s: CPU seconds of a program; what decides that it takes too long, as wall time depends on the load.
            Processes that a program forks have as much each, within ``wall_s`` of the whole.
        wall_s: wall-clock backstop in seconds, for programs that sleep or wait.
        output_bytes: bytes kept of stdout and of stderr, each; a program that writes more is stopped.
        processes: processes and threads of a program in ``namespaces``; in ``landlock`` a program cannot fork, and
            ``memory_mb`` bounds its threads.
        disk_mb: size of the program's scratch folder in MiB.
        workers: programs that run at the same time; more calls wait for their turn.
        queue_s: longest wait for a turn, in seconds.
        max_restarts: how many times a dead local server is replaced before runs fail as infrastructure.
        preload: modules imported once, before programs are forked; those that are not installed are left out.
        url: base address of the remote service.
        remote_retries: further attempts after a 502, 503, 504 or a connection error of the remote service.
    """

    backend: str = "auto"
    memory_mb: int = 1024
    cpu_s: float = 5.0
    wall_s: float = 30.0
    output_bytes: int = 65536
    processes: int = 8
    disk_mb: int = 32
    workers: int = 4
    queue_s: float = 600.0
    max_restarts: int = 10
    preload: tuple[str, ...] = ("numpy", "sympy")
    url: str | None = None
    remote_retries: int = 3

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"env.sandbox.backend is {self.backend!r}; use one of {', '.join(BACKENDS)}.")
        for key in ("memory_mb", "output_bytes", "processes", "disk_mb", "workers"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"env.sandbox.{key} is {value!r}; use a whole number of at least 1.")
        for key in ("max_restarts", "remote_retries"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"env.sandbox.{key} is {value!r}; use a whole number of at least 0.")
        for key in ("cpu_s", "wall_s", "queue_s"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                raise ValueError(f"env.sandbox.{key} is {value!r}; use a number of seconds between 0 and 1e6.")
        if self.wall_s < self.cpu_s:
            raise ValueError(
                f"env.sandbox.wall_s ({self.wall_s}) is below env.sandbox.cpu_s ({self.cpu_s}); raise wall_s, "
                "it is the backstop behind the CPU limit."
            )
        if self.backend == "remote" and not (self.url or "").startswith(("http://", "https://")):
            raise ValueError(
                f"env.sandbox.url is {self.url!r}; backend remote needs the http(s) address of the service."
            )
        for name in self.preload:
            if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"env.sandbox.preload holds {name!r}; use importable module names.")
