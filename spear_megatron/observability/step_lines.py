"""Files with one JSON line per step that survive crashes: what the record and the lineage of a run are written in.

A line is on disk when ``append`` returns. A last line without its newline was cut by a crash and never finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spear_megatron.observability.files import named_errors, sync_path, write_atomically


class StepLines:
    """Appends to one such file, from one process.

    To resume after the checkpoint of step k, give ``resume_step=k``: lines of later steps, and a line cut by a crash,
    are dropped. ``resume_step=None`` starts anew and moves an older file aside.
    """

    def __init__(self, path: Path, version: int, resume_step: int | None = None) -> None:
        """``version`` is the newest schema version that an old file may have.

        Raises:
            ValueError: a damaged line in the middle of the file to resume.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.last_step = _prepare(path, version, resume_step)
        self._stream = path.open("ab")
        sync_path(path.parent)

    def append(self, step: int, line: Mapping[str, Any]) -> None:
        """Write ``line``, which holds ``step`` under that name, and wait until it is on disk.

        Raises:
            ValueError: ``step`` does not come after the last one written, or a number is not finite.
            OSError: it could not be written; names the file. What stands there of the line is cut off when the file
                is opened again.
        """
        if step <= self.last_step:
            raise ValueError(f"step {step} is already recorded in {self.path} (last step: {self.last_step})")
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with named_errors(self.path):
            self._stream.write(data)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.last_step = step

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        with named_errors(self.path):
            self._stream.close()


def read_step_lines(path: Path, version: int) -> list[dict[str, Any]]:
    """Every finished line of ``path``, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is damaged, or has a schema version above ``version``.
    """
    raw_lines = path.read_bytes().split(b"\n")
    return [_parsed(raw, path, number, version) for number, raw in enumerate(raw_lines[:-1], 1) if raw]


def _prepare(path: Path, version: int, resume_step: int | None) -> int:
    """Bring the file to the state after ``resume_step``; returns the last step that it holds, -1 if none."""
    if not path.exists():
        return -1
    if resume_step is None:
        if path.stat().st_size:
            taken = len(list(path.parent.glob(f"{path.stem}.previous-*{path.suffix}")))
            os.replace(path, path.with_name(f"{path.stem}.previous-{taken + 1}{path.suffix}"))
        return -1
    kept = [line for line in read_step_lines(path, version) if line["step"] <= resume_step]
    write_atomically(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept).encode())
    return max((int(line["step"]) for line in kept), default=-1)


def _parsed(raw: bytes, path: Path, number: int, version: int) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path} line {number} is damaged: {error}") from error
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError(f"{path} line {number} is not a record of a step")
    found = line.get("schema_version", 0)
    if found > version:
        raise ValueError(f"{path} has schema version {found}; this program reads up to {version}")
    return line
