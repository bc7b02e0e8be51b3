"""What the client tells the server at its start, as JSON on the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

PROGRAM = "<program>"  # file name of the program in tracebacks
EXIT_ERROR, EXIT_MEMORY = 1, 86
READY = b"ready"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Backend and limits of every run; units as in ``SandboxConfig``.

    ``packages`` are the folders of installed modules that programs may import from. ``scratch`` is the folder on disk
    below which programs get theirs, in backend ``landlock`` only.
    """

    backend: str
    memory_mb: int
    cpu_s: float
    wall_s: float
    output_bytes: int
    processes: int
    disk_mb: int
    preload: tuple[str, ...]
    packages: tuple[str, ...]
    scratch: str

    def to_json(self) -> str:
        """Text for ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Inverse of ``to_json``."""
        values = json.loads(text)
        return cls(**{**values, "preload": tuple(values["preload"]), "packages": tuple(values["packages"])})
