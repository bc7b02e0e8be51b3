"""The few file operations that checkpoints and replay need, durable and in one place, so that tests can fail any."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: path relative to its folder, size and SHA-256 of the content."""

    path: str
    num_bytes: int
    sha256: str


class HashingFile:
    """Write-only binary stream that hashes what passes through it; what ``torch.save`` needs, and no seek."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Append bytes (any buffer); returns their number."""
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Push buffered bytes to the operating system."""
        self._stream.flush()

    def entry(self, path: str) -> FileEntry:
        """What was written so far, under the relative name ``path``."""
        return FileEntry(path, self._size, self._hash.hexdigest())


class FileSystem:
    """Local (or mounted) file system. Every method that changes something is durable when it returns."""

    @contextmanager
    def create(self, path: Path) -> Iterator[HashingFile]:
        """Open a new file for writing; flushed and fsynced when the block ends without an error."""
        with self.open_new(path) as stream:
            yield HashingFile(stream)
            stream.flush()
            os.fsync(stream.fileno())

    def open_new(self, path: Path) -> IO[bytes]:
        """Binary stream of a file that must not exist yet."""
        return open(path, "xb")

    def write(self, path: Path, data: bytes, name: str) -> FileEntry:
        """Write ``data`` as one new file; ``name`` is its path inside the checkpoint."""
        with self.create(path) as stream:
            stream.write(data)
        return stream.entry(name)

    def mkdir(self, path: Path) -> None:
        """Create one folder (its parent exists)."""
        path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        """Atomic rename inside one folder; ``target`` must not exist."""
        os.rename(source, target)
        self.sync_folder(target.parent)

    def sync_folder(self, path: Path) -> None:
        """Make the names inside a folder durable."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove_file(self, path: Path) -> None:
        """Delete one file."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Delete one empty folder."""
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Delete a folder with everything in it, one entry at a time."""
        for folder, names, files in os.walk(path, topdown=False):
            for name in files:
                self.remove_file(Path(folder, name))
            for name in names:
                self.remove_folder(Path(folder, name))
        self.remove_folder(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes an unprivileged process may still write where ``path`` (an existing folder) lies."""
        return shutil.disk_usage(path).free


def hash_file(path: Path, num_bytes: int | None = None) -> str:
    """SHA-256 of a file, or of its first ``num_bytes``, streamed."""
    digest = hashlib.sha256()
    left = path.stat().st_size if num_bytes is None else num_bytes
    with open(path, "rb") as stream:
        while left > 0 and (chunk := stream.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
