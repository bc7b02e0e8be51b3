"""Files outside of checkpoints: their first bytes are checked, and only what nothing names any more is deleted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from replay_ranks import Ranks, payload_of, simulated_ranks

from spear_megatron.checkpoint.errors import DamagedCheckpoint
from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.checkpoint.manifest import JSON, MANIFEST_NAME, Manifest, StateEntry, check_external, read_manifest
from spear_megatron.checkpoint.store import CheckpointStore
from spear_megatron.data.files import FileEntry, FileSystem
from spear_megatron.replay.buffer import ReplayBuffer
from spear_megatron.replay.config import ReplayConfig
from spear_megatron.replay.decisions import ReplayRules
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.replay.payload import BYTES_PER_TOKEN
from spear_megatron.replay.storage import segment_files
from spear_megatron.types import RewardParts, TrajectoryId

ALONE: Any = SimpleNamespace(
    rank=0, world_size=1, is_leader=True, leader_rank=0, dp_rank=0, dp_size=1, tp_size=1, pp_size=1, vpp_size=None
)
RULES = ReplayRules(
    buffer_size=4, score_threshold=0.0, tolerate_steps=2, weight_decay=-1.0, norm_by_std=False,
    replay=ReplayConfig(trigger_ratio=0.0, require="none", segment_mib=1 / 2**20),
)  # fmt: skip


def outside(run_dir: Path, name: str, data: bytes, valid: int | None = None) -> FileEntry:
    """A file of the run directory whose first ``valid`` bytes belong to a checkpoint."""
    path = run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    size = len(data) if valid is None else valid
    return FileEntry(name, size, hashlib.sha256(data[:size]).hexdigest())


def manifest(step: int, external: tuple[FileEntry, ...] = (), files: tuple[FileEntry, ...] = ()) -> Manifest:
    states = {"state": StateEntry(JSON, "state.json")} if files else {}
    return Manifest(
        step=step, fingerprint="f", layout={}, software={}, states=states, files=files, external=external
    )


def saved(store: CheckpointStore, step: int, external: tuple[FileEntry, ...]) -> None:
    staging = store.begin(step)
    entry = store.files.write(staging / "state.json", b"{}", "state.json")
    store.commit(step, manifest(step, external, (entry,)))


def opened(run_dir: Path) -> CheckpointStore:
    store = CheckpointStore(run_dir / "checkpoints")
    store.clean()
    return store


def test_a_manifest_with_external_files_reads_back(tmp_path: Path) -> None:
    entry = outside(tmp_path, "replay/shard_000/segment_000000.bin", b"0123456789", 4)
    written = manifest(3, (entry,))
    (tmp_path / MANIFEST_NAME).write_bytes(written.encode())
    assert read_manifest(tmp_path) == written and read_manifest(tmp_path).external == (entry,)


def test_a_manifest_of_before_external_files_has_none(tmp_path: Path) -> None:
    body = json.loads(manifest(3).encode())
    del body["external"], body["checksum"]
    body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(body))
    assert read_manifest(tmp_path).external == () and check_external(tmp_path, read_manifest(tmp_path)) == []


def test_an_altered_entry_is_refused(tmp_path: Path) -> None:
    entry = outside(tmp_path, "x.bin", b"0123456789", 4)
    text = manifest(3, (entry,)).encode().decode()
    (tmp_path / MANIFEST_NAME).write_text(text.replace('"num_bytes": 4', '"num_bytes": 3'))
    with pytest.raises(DamagedCheckpoint, match="checksum"):
        read_manifest(tmp_path)


def test_later_bytes_do_not_matter_and_all_others_do(tmp_path: Path) -> None:
    data = bytes(range(20))
    entry = outside(tmp_path, "x.bin", data, 12)
    found = manifest(1, (entry,))
    path = tmp_path / "x.bin"
    for tail in (b"", b"anything at all"):
        path.write_bytes(data[:12] + tail)
        assert check_external(tmp_path, found) == []
    for at in range(20):
        flipped = bytearray(data)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        expected = ["file x.bin is damaged: the checksum of its 12 bytes differs"] if at < 12 else []
        assert check_external(tmp_path, found) == expected
    for size in range(12):
        path.write_bytes(data[:size])
        assert check_external(tmp_path, found) == [f"file x.bin has {size} bytes, fewer than the 12 named"]
    path.unlink()
    assert check_external(tmp_path, found) == ["file x.bin is missing"]
    path.mkdir()
    assert "x.bin" in check_external(tmp_path, found)[0]


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    entries = tuple(outside(tmp_path, f"{number}.bin", bytes(number + 1)) for number in range(7))
    for entry in entries:
        (tmp_path / entry.path).unlink()
    found = manifest(1, entries)
    parts = [check_external(tmp_path, found, part, 3) for part in range(3)]
    assert sorted(text for part in parts for text in part) == [f"file {number}.bin is missing" for number in range(7)]
    assert all(len(part) in (2, 3) for part in parts)


def test_a_checkpoint_with_damaged_external_files_is_unusable(tmp_path: Path) -> None:
    store = opened(tmp_path)
    saved(store, 1, (outside(tmp_path, "replay/a.bin", b"first"),))
    saved(store, 2, (outside(tmp_path, "replay/b.bin", b"second"),))
    (tmp_path / "replay" / "b.bin").write_bytes(b"sec")
    assert store.problems(1) == [] and "replay/b.bin has 3 bytes" in store.problems(2)[0]


def test_files_of_all_checkpoints_are_named_and_a_damaged_manifest_says_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (1, 2):
        shared = outside(tmp_path, "shared.bin", b"0123456789", step)
        saved(store, step, (shared, outside(tmp_path, f"{step}.bin", b"x")))
    assert store.external_files() == {"shared.bin", "1.bin", "2.bin"}
    (store.path(1) / MANIFEST_NAME).write_text("{")
    with pytest.raises(DamagedCheckpoint):
        store.external_files()


def manager(run_dir: Path, collected: list[set[str]], keep: int = 2) -> CheckpointManager:
    return CheckpointManager(run_dir / "checkpoints", parallel=ALONE, keep=keep, collect=collected.append)


def test_the_manager_collects_by_the_manifests_that_it_kept(tmp_path: Path) -> None:
    collected: list[set[str]] = []
    held = manager(tmp_path, collected)
    for step in (1, 2, 3):
        saved(held._store, step, (outside(tmp_path, f"{step}.bin", b"x"),))
        held._store.keep_last(2)
        held._collect_external()
    assert collected == [{"1.bin"}, {"1.bin", "2.bin"}, {"2.bin", "3.bin"}]


def test_with_a_damaged_manifest_nothing_is_collected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collected: list[set[str]] = []
    held = manager(tmp_path, collected)
    saved(held._store, 1, (outside(tmp_path, "1.bin", b"x"),))
    (held._store.path(1) / MANIFEST_NAME).write_text("{")
    saved(held._store, 2, ())
    held._collect_external()
    assert collected == [] and "all kept for now" in caplog.text
    held._store.keep_last(1)  # the damaged one leaves: its files may
    held._collect_external()
    assert collected == [set()]


def replay_step(ranks: Ranks, step: int, count: int = 2) -> tuple[dict[str, Any], list[FileEntry]]:
    """Two trajectories per rank, then a snapshot; every record fills a file of its own."""
    entries = [
        ReplayEntry(
            id=TrajectoryId(step, task, 0), shard=task % ranks.size, base=1.0, bonus=0.0, parts=RewardParts(1.0),
            stored_reward=1.0, advantage=1.0, num_tokens=5, num_sampled=4, num_bytes=5 * BYTES_PER_TOKEN,
            temperature=1.0,
        )
        for task in range(count)
    ]  # fmt: skip

    def act(buffer: ReplayBuffer, rank: int) -> Any:
        buffer.expire(step)
        own = {item.id: payload_of(item.id, 5) for item in entries if item.shard == rank}
        buffer.push(step, buffer.plan_push(entries), own, [])
        return buffer.snapshot()

    return ranks.each(act)[0]


def test_collection_deletes_what_neither_a_checkpoint_nor_the_buffer_needs(tmp_path: Path) -> None:
    store, states = opened(tmp_path), {}
    with simulated_ranks():
        ranks = Ranks(2, tmp_path, RULES, baseline_size=3)
        for step in range(1, 9):
            states[step], files = replay_step(ranks, step)
            saved(store, step, tuple(files))
            store.keep_last(2)
            before = segment_files(tmp_path)
            ranks.buffers[0].collect(store.external_files())
            held = {place["file"] for place in (row["place"] for row in states[step]["entries"])}
            gone = before - segment_files(tmp_path)
            assert not gone & (store.external_files() | held)
            # Two kept checkpoints of two steps each (tolerance 2, capacity 4): three steps of one file per shard.
            assert segment_files(tmp_path) == store.external_files() and len(segment_files(tmp_path)) <= 6
            assert all(store.problems(kept) == [] for kept in store.steps())
        for step in (7, 8):
            again = Ranks(3, tmp_path, RULES, baseline_size=3)
            found = again.each(
                lambda buffer, rank: buffer.restore(states[step], read_manifest(store.path(step)).external)
            )
            assert found[0]["restored"] == 4
            again.close()
        ranks.close()


def test_open_files_and_those_of_later_steps_are_not_collected(tmp_path: Path) -> None:
    with simulated_ranks():
        ranks = Ranks(2, tmp_path, RULES, baseline_size=3)
        replay_step(ranks, 1)
        ranks.each(lambda buffer, rank: buffer.expire(9))
        ranks.each(lambda buffer, rank: buffer.snapshot())
        ranks.buffers[0].collect(set())
        assert len(segment_files(tmp_path)) == 2  # empty, but open
        replay_step(ranks, 9)
        replay_step(ranks, 10)
        third = segment_files(tmp_path)
        ranks.each(lambda buffer, rank: buffer.expire(20))
        ranks.buffers[0].collect(set())  # of the snapshot before: what was in use then stays
        assert len(third) - len(segment_files(tmp_path)) == 2
        ranks.close()


def test_a_file_that_is_gone_already_stops_nothing_and_others_do(tmp_path: Path) -> None:
    class Stubborn(FileSystem):
        def remove_file(self, path: Path) -> None:
            raise PermissionError(13, "not yours", str(path))

    with simulated_ranks():
        ranks = Ranks(1, tmp_path, RULES, baseline_size=3)
        for step in (1, 2, 3, 9):
            replay_step(ranks, step)
        stale = sorted(segment_files(tmp_path) - {min(segment_files(tmp_path))})
        (tmp_path / min(segment_files(tmp_path))).unlink()
        ranks.buffers[0].collect(set())
        assert stale[0] not in segment_files(tmp_path)
        replay_step(ranks, 15)
        ranks.buffers[0]._files = Stubborn()
        with pytest.raises(PermissionError):
            ranks.buffers[0].collect(set())
        ranks.close()
