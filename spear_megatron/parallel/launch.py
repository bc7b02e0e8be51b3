"""The environment variables with which ``torchrun`` tells a process its place among the ranks."""

from __future__ import annotations

import os

_REMEDY = "start all ranks with torchrun, which sets these variables, or unset them for a single process"


def world_size() -> int:
    """Ranks of the job; 1 without a launcher."""
    return _number("WORLD_SIZE", 1, least=1)


def local_world_size(default: int = 1) -> int:
    """Ranks of the job on this host."""
    return _number("LOCAL_WORLD_SIZE", default, least=1)


def local_rank() -> int:
    """Number of this rank on its host."""
    return _number("LOCAL_RANK", 0, least=0)


def check_launch() -> None:
    """Whether the variables that tell this rank its place go together.

    Raises:
        ValueError: one is missing, no number, or too large; names it and the remedy.
    """
    size, rank = world_size(), _number("RANK", 0, least=0)
    local_rank(), local_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(f"RANK={rank} is set and WORLD_SIZE is not: {_REMEDY}")
    if rank >= size:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={size}: {_REMEDY}")
    if size == 1 and "MASTER_ADDR" not in os.environ:
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"WORLD_SIZE={size} ranks need the variable {name}, which is not set: {_REMEDY}")
    port = _number("MASTER_PORT", 0, least=0)
    if port > 65535:
        raise ValueError(f"MASTER_PORT={port} is no port, the largest is 65535: {_REMEDY}")


def _number(name: str, default: int, *, least: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.strip().isdecimal() or int(text) < least:
        wanted = f"the environment variable {name} must be an integer of at least {least}"
        raise ValueError(f"{wanted}, got {text!r}: {_REMEDY}")
    return int(text)
