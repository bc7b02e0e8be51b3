"""Saving and resuming on real ranks: fallback by name, keep-last-k, full disks, background saves, agreement."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path
from typing import IO

import pytest
import torch
from harness import run_ranks
from test_checkpoint_reshard import build, save, update
from tiny import make_tiny_hf

from spear_megatron.checkpoint.errors import CheckpointError
from spear_megatron.data.files import FileSystem
from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.parallel.state import initialize
from spear_megatron.trainer.actor import Actor


class FullDisk(FileSystem):
    """Reports free space, then runs out while a file of the given name is written."""

    def __init__(self, victim: str) -> None:
        self.victim = victim

    def open_new(self, path: Path) -> IO[bytes]:
        if path.name == self.victim:
            # Every write to this device fails with ENOSPC, as on a full disk.
            return open("/dev/full", "wb")
        return super().open_new(path)


class SmallDisk(FileSystem):
    def free_bytes(self, path: Path) -> int:
        return 1000


class SlowDisk(FileSystem):
    """Writes wait until the file ``gate`` exists."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def open_new(self, path: Path) -> IO[bytes]:
        while not self.gate.exists():
            time.sleep(0.01)
        return super().open_new(path)


def weights(actor: Actor) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in actor.chunks for parameter in chunk.parameters()]


def load(manager: CheckpointManager, actor: Actor, *required: str) -> int | None:
    loaded = manager.load_latest(actor.chunks, actor.optimizer.megatron, actor.optimizer.scheduler, required)
    return None if loaded is None else loaded.step


@megatron_on_cpu()
def _save_three(hf: Path, root: Path) -> list[int]:
    parallel = initialize(timeout_s=60)
    actor = build(hf, parallel)
    manager = CheckpointManager(root, parallel=parallel, keep=2, assets=hf, fingerprint="one")
    assert load(manager, actor) is None
    for step in (1, 2, 3):
        update(actor, step, parallel)
        save(manager, step, actor)
    return manager.steps()


@megatron_on_cpu()
def _load(hf: Path, root: Path, required: tuple[str, ...]) -> tuple[int | None, list[str], str | None]:
    parallel = initialize(timeout_s=60)
    actor = build(hf, parallel)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("spear_megatron.checkpoint")
    log.addHandler(handler)
    try:
        return load(CheckpointManager(root, parallel=parallel, keep=2), actor, *required), messages, None
    except CheckpointError as error:
        return None, messages, str(error)
    finally:
        log.removeHandler(handler)


def test_damage_falls_back_by_agreement_and_is_logged_by_name(tmp_path: Path) -> None:
    hf, root = make_tiny_hf(tmp_path / "hf"), tmp_path / "checkpoints"
    assert run_ranks(_save_three, 2, hf, root) == [[2, 3], [2, 3]]
    assert (root / "step_00000003" / "hf" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    stale = root / ".staging-step_00000009" / "sharded"
    stale.mkdir(parents=True)
    (stale / "__0_0.distcp").write_bytes(b"half")

    results = run_ranks(_load, 2, hf, root, ("rng",))
    assert [step for step, _, _ in results] == [3, 3]
    assert "another configuration" in results[0][1][-1]
    assert not stale.exists()

    with open(root / "step_00000003" / "sharded" / "__0_0.distcp", "r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)
        stream.seek(1000)
        stream.write(bytes([byte[0] ^ 1]))
    results = run_ranks(_load, 2, hf, root, ("rng",))
    assert [step for step, _, _ in results] == [2, 2]
    assert "step_00000003: file sharded/__0_0.distcp is damaged" in results[0][1][0]

    for step, _, error in run_ranks(_load, 2, hf, root, ("rng", "replay")):
        assert step is None and error is not None
        assert "state 'replay' is missing" in error and "no usable checkpoint" in error


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    hf, root = make_tiny_hf(tmp_path / "hf"), tmp_path / "checkpoints"
    run_ranks(_save_three, 1, hf, root)
    ((step, _, error),) = run_ranks(_load, 1, make_tiny_hf(tmp_path / "other", num_layers=6), root, ())
    assert step is None and error is not None and "does not fit this model" in error


@megatron_on_cpu()
def _full_disk(hf: Path, root: Path, victim_rank: int, victim: str, async_save: bool) -> tuple[str, int | None, bool]:
    """As two pipeline stages both ranks have a file to write."""
    parallel = initialize(pp=2, timeout_s=60)
    actor = build(hf, parallel)
    good = CheckpointManager(root, parallel=parallel, keep=1)
    update(actor, 1, parallel)
    save(good, 1, actor)
    before = weights(actor)
    files = FullDisk(victim) if parallel.rank == victim_rank else FileSystem()
    failing = CheckpointManager(root, parallel=parallel, keep=1, files=files, async_save=async_save)
    update(actor, 2, parallel)
    with pytest.raises(CheckpointError) as caught:
        save(failing, 2, actor)
        failing.wait()
    update(actor, 3, parallel)  # the run may go on
    step = load(good, actor)
    return str(caught.value), step, all(map(torch.equal, before, weights(actor)))


@pytest.mark.parametrize(
    ("rank", "victim", "async_save"),
    [(1, "__1_0.distcp", False), (0, "common.pt", False), (0, "scheduler.json", True), (0, "manifest.json", False)],
)
def test_a_disk_that_fills_up_during_the_write(rank: int, victim: str, async_save: bool, tmp_path: Path) -> None:
    hf, root = make_tiny_hf(tmp_path / "hf"), tmp_path / "checkpoints"
    for message, step, same in run_ranks(_full_disk, 2, hf, root, rank, victim, async_save):
        assert "step 2" in message and os.strerror(errno.ENOSPC) in message and str(root) in message
        assert step == 1 and same


@megatron_on_cpu()
def _small_disk(hf: Path, root: Path) -> str:
    parallel = initialize(timeout_s=60)
    actor = build(hf, parallel)
    manager = CheckpointManager(root, parallel=parallel, keep=1, files=SmallDisk())
    with pytest.raises(CheckpointError) as caught:
        save(manager, 1, actor)
    assert list(root.iterdir()) == []
    return str(caught.value)


def test_too_little_space_is_refused_before_writing(tmp_path: Path) -> None:
    hf, root = make_tiny_hf(tmp_path / "hf"), tmp_path / "checkpoints"
    messages = run_ranks(_small_disk, 2, hf, root)
    assert messages[0] == messages[1]
    assert f"step 1 in {root}: it needs" in messages[0] and "1000 are free" in messages[0]


@megatron_on_cpu()
def _background(hf: Path, root: Path, gate: Path) -> bool:
    """Training goes on while the disk waits; the checkpoint holds the state of its own step."""
    parallel = initialize(timeout_s=60)
    actor = build(hf, parallel)
    slow = SlowDisk(gate) if parallel.rank == 0 else FileSystem()
    manager = CheckpointManager(root, parallel=parallel, keep=2, async_save=True, files=slow)
    update(actor, 1, parallel)
    at_save = weights(actor)
    save(manager, 1, actor)
    expected = update(actor, 2, parallel)
    assert manager.poll() is None and manager.steps() == []
    if parallel.rank == 0:
        gate.touch()
    deadline = time.monotonic() + 30
    while (completed := manager.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert completed == 1 and manager.steps() == [1] and manager.poll() is None
    save(manager, 2, actor)
    save(manager, 3, actor)  # completes step 2 first
    assert manager.steps() == [1, 2]
    manager.wait()
    assert manager.steps() == [2, 3]
    return expected is not None and not all(map(torch.equal, at_save, weights(actor)))


def test_a_background_save_completes_at_a_later_step(tmp_path: Path) -> None:
    hf, root = make_tiny_hf(tmp_path / "hf"), tmp_path / "checkpoints"
    assert run_ranks(_background, 2, hf, root, tmp_path / "gate") == [True, True]


@megatron_on_cpu()
def _background_content(hf: Path, root: Path) -> bool:
    parallel = initialize(timeout_s=60)
    actor = build(hf, parallel)
    manager = CheckpointManager(root, parallel=parallel, keep=2, async_save=True)
    update(actor, 1, parallel)
    at_save = weights(actor)
    save(manager, 1, actor)
    after = update(actor, 2, parallel)
    manager.wait()
    update(actor, 3, parallel)
    assert load(manager, actor) == 1
    assert all(map(torch.equal, at_save, weights(actor)))
    assert update(actor, 2, parallel) == after
    return True


def test_a_background_save_holds_the_state_of_its_own_step(tmp_path: Path) -> None:
    hf, root = make_tiny_hf(tmp_path / "hf"), tmp_path / "checkpoints"
    assert run_ranks(_background_content, 2, hf, root) == [True, True]


@megatron_on_cpu()
def _late(hf: Path, root: Path, gate: Path) -> str:
    parallel = initialize(timeout_s=60)
    actor = build(hf, parallel)
    slow = SlowDisk(gate) if parallel.rank == 0 else FileSystem()
    manager = CheckpointManager(root, parallel=parallel, keep=2, files=slow, write_timeout_s=0.3)
    with pytest.raises(CheckpointError) as caught:
        save(manager, 1, actor)
    gate.touch()
    return str(caught.value)


def test_a_write_past_its_deadline_is_named_on_every_rank(tmp_path: Path) -> None:
    hf, root = make_tiny_hf(tmp_path / "hf"), tmp_path / "checkpoints"
    for message in run_ranks(_late, 2, hf, root, tmp_path / "gate"):
        assert "step 1" in message and "on ranks [0]" in message


@megatron_on_cpu()
def _again(hf: Path, root: Path) -> tuple[bool, bool]:
    parallel = initialize(timeout_s=60)
    actor = build(hf, parallel)
    manager = CheckpointManager(root, parallel=parallel, keep=2)
    update(actor, 1, parallel)
    save(manager, 1, actor)
    manifest = root / "step_00000001" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    save(manager, 1, actor)
    untouched = manifest.stat().st_mtime_ns == written
    (root / "step_00000001" / "states" / "rng.json").write_text("{}")
    save(manager, 1, actor)
    return untouched, load(manager, actor, "rng") == 1


def test_a_step_is_written_again_only_when_damaged(tmp_path: Path) -> None:
    hf, root = make_tiny_hf(tmp_path / "hf"), tmp_path / "checkpoints"
    assert run_ranks(_again, 1, hf, root) == [(True, True)]


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    for options in ({"keep": 0}, {"keep": 1, "min_free_factor": 0.5}):
        with pytest.raises(ValueError, match="must be at least 1"):
            CheckpointManager(tmp_path, parallel=None, **options)  # type: ignore[arg-type]


@megatron_on_cpu()
def _rates_after_resume(hf: Path, root: Path, lr: float) -> tuple[float, float]:
    parallel = initialize(timeout_s=60)
    try:
        actor = build(hf, parallel, lr=lr)
        manager = CheckpointManager(root, parallel=parallel, keep=2)
        if load(manager, actor) is None:
            for step in range(1, 6):
                update(actor, step, parallel)
            save(manager, 5, actor)
        else:
            actor.optimizer.follow_configuration()
        now = actor.optimizer.lr
        return now, update(actor, 6, parallel)[2]
    finally:
        parallel.destroy()


def test_a_resumed_run_follows_the_learning_rate_of_its_configuration(tmp_path: Path) -> None:
    hf = make_tiny_hf(tmp_path / "hf")
    root = tmp_path / "checkpoints"
    (before,) = run_ranks(_rates_after_resume, 1, hf, root, 1e-3)
    (same,) = run_ranks(_rates_after_resume, 1, hf, root, 1e-3)
    (half,) = run_ranks(_rates_after_resume, 1, hf, root, 5e-4)
    assert same == before
    assert half == pytest.approx((before[0] / 2, before[1] / 2), rel=1e-9)
