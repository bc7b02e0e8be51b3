"""Small durable writes: a file is either the old or the new one, whatever moment the process dies at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` and wait until file and folder are on disk.

    Raises:
        ValueError: ``path`` is a folder or a device.
        OSError: it could not; names the file, and leaves the old one as it was.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no ordinary file and is not replaced: name another")
    temporary = path.with_name(f".{path.name}.tmp")
    with named_errors(temporary):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()  # on a full disk every byte counts
            raise
    os.replace(temporary, path)
    sync_path(path.parent)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Give an error of writing, which knows only a descriptor, the name of the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync_path(path: Path) -> None:
    """Make a file's bytes, or the names created, renamed or removed in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
