"""The folder beside the output in which a conversion grows, and goes on after a kill.

``.NAME.converting`` holds ``job.json`` (what is converted into what), one record per finished file under ``files/``,
and the output under ``out/``. A file is finished when its record exists, which is written after the file was made
durable, read back and compared with the source. The output takes its name by one rename at the very end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from spear_megatron.data.files import FileSystem, hash_file
from spear_megatron.observability.files import write_atomically

JOB_NAME = "job.json"


@dataclass(frozen=True)
class Record:
    """A finished file of the output.

    Attributes:
        path: within the output.
        num_bytes, sha256: of the file.
        tensors: Hugging Face name -> SHA-256 of the tensor's bytes in its Hugging Face dtype.
        parts: [key, offsets, sizes, first byte, number of bytes] of every saved part of a global tensor, in a
            checkpoint's file.
    """

    path: str
    num_bytes: int
    sha256: str
    tensors: dict[str, str]
    parts: list[Any]


class Workspace:
    """The working folder of one conversion into ``out``."""

    def __init__(self, out: Path, job: Mapping[str, Any], files: FileSystem | None = None) -> None:
        """``job`` is JSON-able and decides every byte of the output: another job cannot go on in this folder."""
        self.out = out
        self.folder = out.with_name(f".{out.name}.converting")
        self.result = self.folder / "out"
        self.job = dict(job)
        self.job_id = hashlib.sha256(json.dumps(self.job, sort_keys=True).encode()).hexdigest()
        self.files = files or FileSystem()
        self._lock: IO[bytes] | None = None

    def open(self, needed_bytes: int) -> None:
        """Create the folder, or take up the one that an interrupted conversion left; check the space. Rank 0.

        Raises:
            ValueError: ``out`` is not empty, the folder belongs to another conversion or a running one, or there is no
                room for ``needed_bytes`` beyond what is there.
        """
        check_new(self.out)
        known = self.folder / JOB_NAME
        if known.exists() and _read_json(known) != self.job:
            raise ValueError(
                f"{self.folder} was left by an unfinished conversion of another source, of other options, or of a "
                "source that was changed since: remove that folder to start anew"
            )
        for folder in (self.folder, self.folder / "files", self.result):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process converts into {self.out} right now: wait for it or end it") from None
        there = sum(path.stat().st_size for path in self.result.rglob("*") if path.is_file())
        missing, free = needed_bytes - there, self.files.free_bytes(self.folder)
        if free < missing:
            raise ValueError(
                f"no room for {self.out}: {missing / 1e9:.2f} GB are still needed and {free / 1e9:.2f} GB are free "
                f"there; free some space or choose another folder"
            )
        write_atomically(known, json.dumps(self.job, indent=1).encode())

    def kept(self, paths: Sequence[str], part: int, num_parts: int) -> tuple[list[str], list[str]]:
        """Of every ``num_parts``-th file from ``part``: those finished and intact, and those altered since."""
        intact: list[str] = []
        altered: list[str] = []
        for path in paths[part::num_parts]:
            record = self.record(path)
            if record is None:
                continue
            file = self.result / path
            same = file.is_file() and file.stat().st_size == record.num_bytes and hash_file(file) == record.sha256
            (intact if same else altered).append(path)
        return intact, altered

    def record(self, path: str) -> Record | None:
        """The record of a finished file, None without one."""
        file = self._record_path(path)
        return Record(**_read_json(file)) if file.exists() else None

    def fresh(self, path: str) -> Path:
        """Where to write a file; what an interrupted attempt left of it is removed, its record first."""
        self._record_path(path).unlink(missing_ok=True)
        target = self.result / path
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def finish(self, record: Record) -> None:
        """Count a file, durable and compared, as finished."""
        write_atomically(self._record_path(record.path), json.dumps(vars(record)).encode())

    def publish(self) -> None:
        """Give the complete output its name, and remove the working folder. Rank 0."""
        if self.out.exists():
            self.out.rmdir()  # an empty folder that was there
        self.files.rename(self.result, self.out)
        self.close()
        self.clear()

    def clear(self) -> None:
        """Remove the working folder that a kill after ``publish`` left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _record_path(self, path: str) -> Path:
        return self.folder / "files" / f"{path.replace('/', '-')}.json"


def check_new(out: Path) -> None:
    """Refuse an output folder that holds something (ValueError)."""
    if os.path.lexists(out) and (not out.is_dir() or next(out.iterdir(), None) is not None):
        raise ValueError(f"{out} exists and is not empty: give a new folder")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove {path.parent} to start anew") from None
