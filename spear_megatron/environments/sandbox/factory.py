"""Chooses a sandbox for a configuration, and tells what this machine offers."""

from __future__ import annotations

from dataclasses import dataclass

from spear_megatron.environments.sandbox.config import SandboxConfig
from spear_megatron.environments.sandbox.local import LocalSandbox, try_backend
from spear_megatron.environments.sandbox.protocol import Sandbox

_LOCAL_BACKENDS = ("namespaces", "landlock")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendProbe:
    """Whether a backend works here; ``reason`` says why not and is empty otherwise."""

    backend: str
    available: bool
    reason: str = ""


def probe() -> tuple[BackendProbe, ...]:
    """Try every local backend by confining one program with it, in order of preference. Takes about 0.2 s."""
    results = []
    for backend in _LOCAL_BACKENDS:
        reason = try_backend(backend)
        results.append(BackendProbe(backend=backend, available=reason is None, reason=reason or ""))
    return tuple(results)


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """The sandbox that ``config`` asks for; ``auto`` takes the first local backend that works here.

    Blocks for about 0.1 s while it tries a local backend.

    Raises:
        ValueError: no local backend works here, or not the one asked for. Nothing ever runs unsandboxed.
    """
    if config.backend == "remote":
        from spear_megatron.environments.sandbox.remote import RemoteSandbox

        return RemoteSandbox(config)
    reasons = []
    for backend in _LOCAL_BACKENDS if config.backend == "auto" else (config.backend,):
        reason = try_backend(backend)
        if reason is None:
            return LocalSandbox(config, backend)
        reasons.append(f"{backend} ({reason})")
    raise ValueError(
        f"No code sandbox works on this machine: {'; '.join(reasons)}; allow unprivileged user namespaces or "
        "Landlock, or set env.sandbox.backend=remote with env.sandbox.url."
    )
