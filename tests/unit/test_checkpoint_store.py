"""Checkpoint folders: whole or not there, whatever moment a kill or a full disk chooses; damage is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from spear_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from spear_megatron.data.files import FileSystem
from spear_megatron.checkpoint.manifest import JSON, SHARDED, Manifest, StateEntry, read_manifest
from spear_megatron.checkpoint.store import CheckpointStore, step_name


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the product may catch it."""


class FailingFile:
    """Writes half of what it is given, then fails."""

    def __init__(self, stream: IO[bytes], failure: BaseException) -> None:
        self._stream, self._failure = stream, failure

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stream.close()

    def write(self, data: memoryview) -> int:
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        raise self._failure


class FailingFileSystem(FileSystem):
    """Fails at operation number ``fatal``: before it, or in the middle of a write."""

    def __init__(self, fatal: int, failure: BaseException) -> None:
        self.count, self.fatal, self.failure = 0, fatal, failure

    def tick(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            raise self.failure

    def open_new(self, path: Path) -> IO[bytes]:
        self.tick()
        self.count += 1
        stream = super().open_new(path)
        return FailingFile(stream, self.failure) if self.count == self.fatal else stream  # type: ignore[return-value]

    def mkdir(self, path: Path) -> None:
        self.tick()
        super().mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.tick()
        super().rename(source, target)
        self.tick()

    def sync_folder(self, path: Path) -> None:
        self.tick()
        super().sync_folder(path)

    def remove_file(self, path: Path) -> None:
        self.tick()
        super().remove_file(path)

    def remove_folder(self, path: Path) -> None:
        self.tick()
        super().remove_folder(path)


def save(store: CheckpointStore, step: int, *, extra: bytes = b"") -> None:
    """What the manager does, with plain bytes in place of tensors."""
    staging = store.begin(step, ("sharded", "states"))
    weights = store.files.write(staging / "sharded" / "w", f"weights {step}".encode() * 50 + extra, "sharded/w")
    state = store.files.write(staging / "states" / "rng.json", json.dumps({"seed": step}).encode(), "states/rng.json")
    manifest = Manifest(
        step=step,
        fingerprint="f",
        layout={"tp": 1},
        software={},
        states={"model": StateEntry(SHARDED, "sharded"), "rng": StateEntry(JSON, "states/rng.json")},
        files=(weights, state),
    )
    store.commit(step, manifest)


def opened(root: Path) -> CheckpointStore:
    store = CheckpointStore(root)
    store.clean()
    return store


def good_steps(store: CheckpointStore) -> list[int]:
    return [step for step in store.steps() if not store.problems(step, ("model", "rng"))]


def test_a_saved_step_is_good_and_its_manifest_reads_back(tmp_path: Path) -> None:
    store = opened(tmp_path / "run" / "checkpoints")
    save(store, 12)
    assert store.steps() == [12]
    assert store.problems(12, ("model", "rng")) == []
    manifest = read_manifest(store.path(12))
    assert (manifest.step, manifest.fingerprint, manifest.layout) == (12, "f", {"tp": 1})
    assert manifest.num_bytes == sum(
        path.stat().st_size for path in store.path(12).rglob("*") if path.is_file() and path.name != "manifest.json"
    )
    assert {path.name for path in store.root.iterdir()} == {"step_00000012"}


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    kills = 0
    for fatal in range(1, 1000):
        root = tmp_path / str(fatal)
        store = opened(root)
        save(store, 1)
        save(store, 2)
        (store.path(2) / "states" / "rng.json").unlink()  # damaged: will be replaced by a new save of step 2
        failing = CheckpointStore(root, FailingFileSystem(fatal, Killed()))
        try:
            for step in (2, 3):
                save(failing, step)
                failing.keep_last(1)
            break
        except Killed:
            kills += 1
        again = opened(root)
        good = good_steps(again)
        assert good, f"no good checkpoint after a kill at operation {fatal}"
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
        save(again, good[-1] + 1)
        again.keep_last(1)
        assert good_steps(again) == again.steps() == [good[-1] + 1]
    assert kills > 40


def test_a_full_disk_at_any_operation_of_a_save_keeps_the_last_good_one(tmp_path: Path) -> None:
    for fatal in range(1, 200):
        root = tmp_path / str(fatal)
        save(opened(root), 1)
        failing = CheckpointStore(root, FailingFileSystem(fatal, OSError(errno.ENOSPC, "No space left on device")))
        try:
            save(failing, 2)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        store = CheckpointStore(root)
        store.discard(2)
        assert 1 in good_steps(store)
    assert fatal > 15
    assert good_steps(CheckpointStore(root)) == [1, 2]


def _truncate(folder: Path) -> None:
    os.truncate(folder / "sharded" / "w", 10)


def _flip(folder: Path) -> None:
    path = folder / "sharded" / "w"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


def _edit_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        body = json.loads(path.read_text())
        change(body)
        path.write_text(json.dumps(body))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "file sharded/w has 10 bytes instead of 450"),
    "flipped byte": (_flip, "file sharded/w is damaged"),
    "missing file": (lambda folder: (folder / "sharded" / "w").unlink(), "file sharded/w is missing"),
    "missing state file": (lambda folder: (folder / "states" / "rng.json").unlink(), "file states/rng.json is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "cut manifest": (lambda folder: os.truncate(folder / "manifest.json", 200), "manifest.json cannot be read"),
    "other program": (_edit_manifest(lambda body: body.update(format="x")), "not a manifest of this program"),
    "unknown version": (_edit_manifest(lambda body: body.update(version=99)), "has version 99"),
    "altered manifest": (_edit_manifest(lambda body: body.update(step=3)), "does not match its own checksum"),
    "list manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), "not a manifest of this program"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    store = opened(tmp_path)
    save(store, 1)
    save(store, 2)
    damage(store.path(2))
    (problem,) = store.problems(2, ("model", "rng"))
    assert message in problem
    assert good_steps(store) == [1]


def test_any_flipped_byte_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    save(store, 1)
    path = store.path(1) / "manifest.json"
    original = path.read_bytes()
    for position in range(0, len(original), 7):
        damaged = bytearray(original)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        same = False
        try:
            same = json.loads(bytes(damaged)) == json.loads(original)
        except ValueError:
            pass
        assert same or store.problems(1), f"byte {position} flipped unnoticed"


def test_a_missing_state_and_a_renamed_folder_are_refused(tmp_path: Path) -> None:
    store = opened(tmp_path)
    save(store, 1)
    assert store.problems(1, ("model", "rng", "replay")) == ["state 'replay' is missing"]
    shutil.move(store.path(1), store.path(5))
    assert store.problems(5) == ["manifest.json belongs to step 1"]


def test_ranks_share_the_checking(tmp_path: Path) -> None:
    store = opened(tmp_path)
    save(store, 1)
    _flip(store.path(1))
    found = [store.problems(1, (), part, 2) for part in range(2)]
    assert sorted(len(problems) for problems in found) == [0, 1]


def test_keep_last_counts_good_ones_only(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (1, 2, 3, 4):
        save(store, step)
    _flip(store.path(3))
    assert store.keep_last(2, refused={3}) == [1]
    assert store.steps() == [2, 3, 4]
    save(store, 5)
    assert store.keep_last(2, refused={3}) == [2, 3]
    assert good_steps(store) == [4, 5]


def test_no_space_is_refused_before_writing(tmp_path: Path) -> None:
    class SmallDisk(FileSystem):
        def free_bytes(self, path: Path) -> int:
            return 1000

    store = CheckpointStore(tmp_path, SmallDisk())
    store.check_space(3, 1000)
    with pytest.raises(CheckpointError, match=rf"step 3 in {tmp_path}: it needs 1001 bytes and 1000 are free"):
        store.check_space(3, 1001)


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_7").mkdir()
    (tmp_path / "step_00000009").write_text("a file")
    store = opened(tmp_path)
    assert store.steps() == []
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "step_7", "step_00000009"}
    assert step_name(123456789) == "step_123456789"


def test_reading_a_manifest_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="manifest.json is missing"):
        read_manifest(tmp_path)
