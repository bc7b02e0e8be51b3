"""Segment files: every damaged byte is found and named, and no kill or full disk loses or confuses a record."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import IO, Any

import pytest

from spear_megatron.data.files import FileEntry, FileSystem, hash_file
from spear_megatron.replay.storage import (
    DamagedSegment,
    Place,
    SegmentWriter,
    newest_files,
    read_record,
    record_bytes,
    segment_files,
)
from spear_megatron.types import TrajectoryId


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the product may catch it."""


class FaultyFileSystem(FileSystem):
    """Fails at operation number ``fatal``: before it, or in the middle of a write. Works again if ``once``."""

    def __init__(self, fatal: int, failure: BaseException, once: bool = False) -> None:
        self.count, self.fatal, self.failure, self.once = 0, fatal, failure, once

    def due(self) -> bool:
        self.count += 1
        return self.count == self.fatal or (self.count > self.fatal and not self.once)

    def tick(self) -> None:
        if self.due():
            raise self.failure

    def open_new(self, path: Path) -> IO[bytes]:
        self.tick()
        return FaultyStream(super().open_new(path), self)  # type: ignore[return-value]

    def mkdir(self, path: Path) -> None:
        self.tick()
        super().mkdir(path)

    def sync_folder(self, path: Path) -> None:
        self.tick()
        super().sync_folder(path)


class FaultyStream:
    """Writes half of what it is given when the file system fails; ``fileno`` stands for fsync."""

    def __init__(self, stream: IO[bytes], files: FaultyFileSystem) -> None:
        self._stream, self._files = stream, files

    def write(self, data: bytes) -> int:
        if self._files.due():
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()
            raise self._files.failure
        return self._stream.write(data)

    def flush(self) -> None:
        self._files.tick()
        self._stream.flush()

    def fileno(self) -> int:
        self._files.tick()
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


def name(number: int) -> TrajectoryId:
    return TrajectoryId(1 + number // 10, number % 10, number)


def content(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (1 + number % 5)


def writer(run_dir: Path, *, size: int = 300, shard: int = 0, files: FileSystem | None = None) -> SegmentWriter:
    return SegmentWriter(run_dir, shard, segment_bytes=size, files=files)


def fill(target: SegmentWriter, numbers: range) -> dict[TrajectoryId, Place]:
    return {name(number): target.append(name(number), content(number)) for number in numbers}


def assert_whole(run_dir: Path, entries: list[FileEntry], places: dict[TrajectoryId, Place]) -> None:
    for entry in entries:
        assert hash_file(run_dir / entry.path, entry.num_bytes) == entry.sha256
    for key, place in places.items():
        assert read_record(run_dir, place, key) == content(key.sample)
        owner = next(entry for entry in entries if entry.path == place.file)
        assert place.offset + place.num_bytes <= owner.num_bytes


def test_records_come_back_from_several_sealed_files(tmp_path: Path) -> None:
    target = writer(tmp_path)
    places = fill(target, range(20))
    entries = target.sync()
    assert_whole(tmp_path, entries, places)
    files = sorted(segment_files(tmp_path))
    assert len(files) > 4 and files == sorted({place.file for place in places.values()})
    assert files[0] == "replay/shard_000/segment_000000.bin" and target.open_file == files[-1]
    for file in files[:-1]:  # sealed as soon as it reached the size, and no earlier
        size = (tmp_path / file).stat().st_size
        last = max((place for place in places.values() if place.file == file), key=lambda place: place.offset)
        assert last.offset < 300 <= size
    assert read_record(tmp_path, places[name(7)], name(7)) == content(7)


def test_an_empty_payload_is_a_record(tmp_path: Path) -> None:
    place = writer(tmp_path).append(name(0), b"")
    assert read_record(tmp_path, place, name(0)) == b""


def test_every_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    target = writer(tmp_path, size=10_000)
    places = fill(target, range(3))
    target.close()
    place = places[name(1)]
    path = tmp_path / place.file
    whole = path.read_bytes()
    assert whole[place.offset : place.offset + place.num_bytes] == record_bytes(name(1), content(1))
    for at in range(place.offset, place.offset + place.num_bytes):
        for bit in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[at] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(DamagedSegment) as caught:
                read_record(tmp_path, place, name(1))
            text = str(caught.value)
            assert place.file in text and f"byte {place.offset}" in text and str(name(1)) in text
            assert read_record(tmp_path, places[name(0)], name(0)) == content(0)
            assert read_record(tmp_path, places[name(2)], name(2)) == content(2)


def test_every_cut_is_found(tmp_path: Path) -> None:
    place = writer(tmp_path).append(name(0), content(0))
    path = tmp_path / place.file
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedSegment, match=rf"is cut: {size} of {len(whole)} bytes"):
            read_record(tmp_path, place, name(0))
    path.unlink()
    with pytest.raises(DamagedSegment, match="cannot be read"):
        read_record(tmp_path, place, name(0))


def test_another_trajectorys_record_is_refused(tmp_path: Path) -> None:
    target = writer(tmp_path)
    places = fill(target, range(2))
    with pytest.raises(DamagedSegment, match=rf"trajectory {name(1)} holds trajectory {name(0)}"):
        read_record(tmp_path, places[name(0)], name(1))


def test_forgotten_files_are_no_longer_named_and_the_open_one_stays_in_use(tmp_path: Path) -> None:
    target = writer(tmp_path)
    places = fill(target, range(12))
    first = places[name(0)].file
    inside = [key for key, place in places.items() if place.file == first]
    target.forget(inside[:1])
    assert first in {entry.path for entry in target.sync()}
    target.forget(inside)
    assert first not in {entry.path for entry in target.sync()}
    target.forget(places)
    assert target.sync() == [] and target.open_file is not None
    more = fill(target, range(12, 13))
    assert more[name(12)].file == target.open_file and more[name(12)].offset > 0
    assert_whole(tmp_path, target.sync(), more)


def test_a_later_process_writes_new_files_and_names_old_ones_as_they_were(tmp_path: Path) -> None:
    first = writer(tmp_path)
    places = fill(first, range(8))
    entries = first.sync()
    lost = fill(first, range(8, 9))  # after the checkpoint
    first.close()
    before = {file: (tmp_path / file).read_bytes() for file in segment_files(tmp_path)}
    second = writer(tmp_path)
    second.adopt(entries, places)
    more = fill(second, range(20, 24))
    assert not {place.file for place in more.values()} & before.keys()
    assert all((tmp_path / file).read_bytes() == data for file, data in before.items())
    assert {entry for entry in second.sync() if entry.path in before} == set(entries)
    assert_whole(tmp_path, second.sync(), places | more)
    second.forget([*places])
    assert {entry.path for entry in second.sync()} == {place.file for place in more.values()}
    assert lost.keys().isdisjoint(more)


def test_shards_have_folders_of_their_own_and_share_the_parent(tmp_path: Path) -> None:
    class Slow(FileSystem):
        def mkdir(self, path: Path) -> None:
            if not path.exists():  # another leader was faster
                path.mkdir()
            super().mkdir(path)

    one, two = writer(tmp_path, files=Slow()), writer(tmp_path, shard=1)
    assert one.append(name(0), b"a").file == "replay/shard_000/segment_000000.bin"
    assert two.append(name(1), b"b").file == "replay/shard_001/segment_000000.bin"


def test_names_are_not_used_again_while_the_newest_file_is_there(tmp_path: Path) -> None:
    target = writer(tmp_path)
    fill(target, range(12))
    target.close()
    files = segment_files(tmp_path)
    newest = newest_files(files)
    assert newest == {max(files)}
    for file in files - newest:
        (tmp_path / file).unlink()
    assert writer(tmp_path).append(name(12), b"x").file > max(files)
    assert newest_files({"replay/shard_000/segment_999999.bin", "replay/shard_000/segment_1000000.bin"}) == {
        "replay/shard_000/segment_1000000.bin"
    }


def test_strangers_in_the_folder_are_no_segments(tmp_path: Path) -> None:
    assert segment_files(tmp_path) == set()
    writer(tmp_path).append(name(0), b"a")
    for stranger in ("segment_1.bin", "segment_000001.bin.tmp", "notes.txt"):
        (tmp_path / "replay" / "shard_000" / stranger).write_bytes(b"")
    assert segment_files(tmp_path) == {"replay/shard_000/segment_000000.bin"}


def steps(target: SegmentWriter, checkpoints: list[Any]) -> None:
    """Three steps of four records with a checkpoint each; earlier steps expire."""
    places: dict[TrajectoryId, Place] = {}
    for step in range(3):
        places |= fill(target, range(4 * step, 4 * step + 4))
        if step == 2:
            old = [key for key in places if key.sample < 4]
            target.forget(old)
            places = {key: place for key, place in places.items() if key not in old}
        checkpoints.append((target.sync(), dict(places)))


def test_a_kill_at_any_operation_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    kills = 0
    for fatal in range(1, 200):
        run_dir = tmp_path / str(fatal)
        run_dir.mkdir()
        checkpoints: list[Any] = [([], {})]
        try:
            steps(writer(run_dir, files=FaultyFileSystem(fatal, Killed())), checkpoints)
            break
        except Killed:
            kills += 1
        entries, places = checkpoints[-1]
        assert_whole(run_dir, entries, places)
        again = writer(run_dir)
        again.adopt(entries, places)
        more = fill(again, range(30, 34))
        assert not {place.file for place in more.values()} & {place.file for place in places.values()}
        assert_whole(run_dir, again.sync(), places | more)
    assert kills > 40


def test_a_write_that_fails_once_spoils_nothing_written_later(tmp_path: Path) -> None:
    failures = 0
    for fatal in range(1, 100):
        run_dir = tmp_path / str(fatal)
        run_dir.mkdir()
        files = FaultyFileSystem(fatal, OSError(errno.ENOSPC, "no space"), once=True)
        target = writer(run_dir, files=files)
        places: dict[TrajectoryId, Place] = {}
        for number in range(12):
            try:
                places[name(number)] = target.append(name(number), content(number))
            except OSError:
                failures += 1
        try:
            entries = target.sync()
        except OSError:
            entries = target.sync()
        assert_whole(run_dir, entries, places)
        assert len(places) >= 11
        if files.count < fatal:
            break
    assert failures > 30
