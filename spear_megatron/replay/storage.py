"""Append-only segment files of one leader's payloads: framed records, checksummed, never changed once sealed.

``<run directory>/replay/shard_DDD/segment_NNNNNN.bin``. A record is a header (magic, payload bytes, trajectory id), a
blake2b digest of both, and the payload. A checkpoint names for every file its valid bytes and their SHA-256: whatever
a later, lost step appended is ignored. Names are never used twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from spear_megatron.data.files import FileEntry, FileSystem
from spear_megatron.types import TrajectoryId

FOLDER = "replay"
_MAGIC = b"SMR1"
_HEADER = struct.Struct("<4sQqqq")
_DIGEST_BYTES = 16
_NAME = re.compile(r"segment_(\d{6,})\.bin")


class DamagedSegment(ValueError):
    """A record of a segment file does not hold what was written; the message names file, offset and trajectory."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies: ``file`` relative to the run directory, byte ``offset`` of its header, bytes in all."""

    file: str
    offset: int
    num_bytes: int


def record_bytes(trajectory: TrajectoryId, payload: bytes | memoryview) -> bytes:
    """One framed record."""
    header = _HEADER.pack(_MAGIC, len(payload), *trajectory)
    return b"".join([header, _digest(header, payload), payload])


def read_record(run_dir: Path, place: Place, trajectory: TrajectoryId) -> bytes:
    """Payload of one record, checked.

    Raises:
        DamagedSegment: it is cut, altered, or another trajectory's.
    """
    path = run_dir / place.file
    where = f"{place.file} at byte {place.offset}, trajectory {trajectory}"
    try:
        with open(path, "rb") as stream:
            stream.seek(place.offset)
            data = stream.read(place.num_bytes)
    except OSError as error:
        raise DamagedSegment(f"replay segment {where} cannot be read: {error}") from None
    start = _HEADER.size + _DIGEST_BYTES
    if len(data) != place.num_bytes or len(data) < start:
        raise DamagedSegment(f"replay segment {where} is cut: {len(data)} of {place.num_bytes} bytes")
    header, digest, payload = data[: _HEADER.size], data[_HEADER.size : start], data[start:]
    magic, size, *name = _HEADER.unpack(header)
    if magic != _MAGIC or size != len(payload) or digest != _digest(header, payload):
        raise DamagedSegment(f"replay segment {where} is damaged: its checksum differs")
    if tuple(name) != tuple(trajectory):
        raise DamagedSegment(f"replay segment {where} holds trajectory {TrajectoryId(*name)}")
    return payload


@dataclass
class _Segment:
    """A file with records: how many of its bytes are written, and their hash so far."""

    file: str
    num_bytes: int = 0
    sha256: str = ""
    live: set[TrajectoryId] = field(default_factory=set)


class SegmentWriter:
    """The segment files of one shard. Files left by an earlier process are never written to again."""

    def __init__(self, run_dir: Path, shard: int, *, segment_bytes: int, files: FileSystem | None = None) -> None:
        """Nothing is created before the first append.

        Args:
            segment_bytes: size at which a file is sealed and the next one begun.
        """
        self._run_dir = run_dir
        self._folder = Path(FOLDER) / f"shard_{shard:03d}"
        self._segment_bytes = segment_bytes
        self._files = files or FileSystem()
        self._stream: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._open: _Segment | None = None
        self._torn = False  # a write failed: nobody knows what follows the valid bytes of the open file
        self._segments: dict[str, _Segment] = {}

    def append(self, trajectory: TrajectoryId, payload: bytes | memoryview) -> Place:
        """Write one record; it is on disk for good only after :meth:`sync`. After a failure the next file is begun."""
        if self._open is None or self._torn or self._open.num_bytes >= self._segment_bytes:
            self._begin()
        segment, stream = self._open, self._stream
        assert segment is not None and stream is not None
        data = record_bytes(trajectory, payload)
        place = Place(segment.file, segment.num_bytes, len(data))
        self._torn = True
        stream.write(data)
        stream.flush()
        self._torn = False
        self._hash.update(data)
        segment.num_bytes += len(data)
        segment.sha256 = self._hash.hexdigest()
        segment.live.add(trajectory)
        return place

    def adopt(self, entries: Iterable[FileEntry], places: Mapping[TrajectoryId, Place]) -> None:
        """Take over sealed files of an earlier process that hold the records ``places``."""
        for entry in entries:
            held = {trajectory for trajectory, place in places.items() if place.file == entry.path}
            if held:
                self._segments[entry.path] = _Segment(entry.path, entry.num_bytes, entry.sha256, held)

    def forget(self, trajectories: Iterable[TrajectoryId]) -> None:
        """These records are no longer needed; a sealed file without needed records is no longer named."""
        gone = set(trajectories)
        for segment in list(self._segments.values()):
            segment.live -= gone
            if not segment.live and segment is not self._open:
                del self._segments[segment.file]

    def sync(self) -> list[FileEntry]:
        """Make everything durable; the files with needed records, their valid bytes and SHA-256."""
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return [
            FileEntry(segment.file, segment.num_bytes, segment.sha256)
            for segment in self._segments.values()
            if segment.live
        ]

    @property
    def open_file(self) -> str | None:
        """The file that is being written."""
        return None if self._open is None else self._open.file

    def close(self) -> None:
        """Close the open file; what was appended since the last :meth:`sync` may be lost."""
        if self._stream is not None:
            stream, self._stream, self._open = self._stream, None, None
            with contextlib.suppress(OSError):  # appends flush: what is left is of a write that failed and said so
                stream.close()

    def _begin(self) -> None:
        """Seal the open file and create the next one."""
        if self._stream is not None and self._open is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            if not self._open.live:
                del self._segments[self._open.file]
        self.close()
        folder = self._run_dir / self._folder
        for parent in (folder.parent, folder):
            if not parent.is_dir():
                with contextlib.suppress(FileExistsError):  # leaders create the common parent at the same time
                    self._files.mkdir(parent)
                self._files.sync_folder(parent.parent)
        numbers = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        name = f"segment_{max(numbers, default=-1) + 1:06d}.bin"
        self._stream, self._torn = self._files.open_new(folder / name), False
        self._files.sync_folder(folder)
        self._hash = hashlib.sha256()
        self._open = _Segment(str(self._folder / name))
        self._segments[self._open.file] = self._open


def segment_files(run_dir: Path) -> set[str]:
    """Every segment file there is, by path relative to the run directory."""
    found = (run_dir / FOLDER).glob("shard_*/segment_*.bin")
    return {str(path.relative_to(run_dir)) for path in found if _NAME.fullmatch(path.name)}


def newest_files(files: Iterable[str]) -> set[str]:
    """The file of every folder with the highest number; while it exists, no number is given out again."""
    newest: dict[str, tuple[int, str]] = {}
    for file in files:
        match = _NAME.fullmatch(Path(file).name)
        assert match is not None
        folder = str(Path(file).parent)
        newest[folder] = max(newest.get(folder, (-1, "")), (int(match[1]), file))
    return {file for _, file in newest.values()}


def _digest(header: bytes, payload: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(header, digest_size=_DIGEST_BYTES)
    digest.update(payload)
    return digest.digest()
