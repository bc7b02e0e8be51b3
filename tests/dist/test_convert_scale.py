"""Conversion shared by ranks, interrupted and resumed, compared by checksums, and small in memory."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from safetensors.torch import save_file
from test_checkpoint_convert import read, with_tokenizer
from tiny import make_tiny_hf

from spear_megatron.__main__ import main

from spear_megatron.checkpoint.conversion import to_mcore
from spear_megatron.checkpoint.conversion.to_hf import header
from spear_megatron.checkpoint.conversion.workspace import Workspace
from spear_megatron.checkpoint.convert import hf_to_mcore, mcore_to_hf, verify
from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.data.files import FileSystem
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.model.hf_io import iter_hf_tensors, load_hf_folder
from spear_megatron.model.provider import build_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.state import ParallelState, initialize

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import bench_convert  # noqa: E402

SHARD = 8_000


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return with_tokenizer(make_tiny_hf(tmp_path / "hf", num_layers=2, dtype=torch.bfloat16, max_shard_size="15KB"))


def weight_files(folder: Path) -> dict[str, bytes]:
    found = [*folder.rglob("*.distcp"), *folder.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1
    path.write_bytes(data)


def _both_ways(hf: Path, work: Path) -> tuple[list[str], int]:
    """Runs on every rank; what the ranks say, and how many files this one wrote."""
    said: list[str] = []
    written = []
    original = Workspace.finish

    def finish(space: Workspace, record: Any) -> None:
        written.append(record.path)
        original(space, record)

    Workspace.finish = finish  # type: ignore[method-assign]
    try:
        hf_to_mcore(hf, work / "mcore", shard_bytes=SHARD, say=said.append)
        mcore_to_hf(work / "mcore", work / "back", shard_bytes=SHARD, say=said.append)
        verify(hf, work / "mcore", say=said.append)
    finally:
        Workspace.finish = original  # type: ignore[method-assign]
    return said, len(written)


def _load_cut(root: Path, hf: Path, tp: int, pp: int) -> bool:
    """Whether the trainer's manager loads the checkpoint at a layout, with the weights of ``hf``."""
    with megatron_on_cpu():
        parallel = initialize(tp=tp, pp=pp, timeout_s=60)
        shape = ModelShape.from_folder(hf)
        layout = MegatronConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        chunks = build_model(
            shape, layout, dtype=torch.bfloat16, parallel=parallel, kernels="eager", with_ddp=False
        )
        loaded = CheckpointManager(root, parallel=parallel, keep=1).load_latest(chunks, None, None, ("conversion",))
        assert loaded is not None and loaded.step == 0
        found = dict(iter_hf_tensors(chunks, shape, parallel))
        expected = read(hf)
        return all(value is None or torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.slow
def test_two_ranks_share_the_work_and_write_the_same_bytes(hf: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    _both_ways(hf, tmp_path / "one")
    (said, first), (silent, second) = run_ranks(_both_ways, 2, hf, tmp_path / "two")
    one, two = weight_files(tmp_path / "one"), weight_files(tmp_path / "two")
    assert one == two and len(one) > 8
    assert first and second and first + second == len(one) - 1  # the file of extra states is no unit of work
    assert silent == [] and any("every tensor was read back" in line for line in said)
    assert read(hf).keys() == read(tmp_path / "two" / "back").keys()
    assert all(run_ranks(_load_cut, 2, tmp_path / "two" / "mcore", hf, 2, 1))
    assert all(run_ranks(_load_cut, 2, tmp_path / "one" / "mcore", hf, 1, 2))


def test_it_writes_what_the_trainer_writes(hf: Path, tmp_path: Path) -> None:
    """Same keys, shapes, dtypes and objects in the index as a checkpoint of the manager; same safetensors bytes."""
    from torch.distributed.checkpoint import FileSystemReader

    ours = hf_to_mcore(hf, tmp_path / "ours", shard_bytes=SHARD)
    with megatron_on_cpu():
        parallel = initialize()
        theirs = _save_with_manager(hf, tmp_path / "theirs", parallel)
        parallel.destroy()
    indices = [FileSystemReader(folder / "sharded").read_metadata() for folder in (ours, theirs)]
    found, expected = [
        {
            key: (tuple(value.size), value.properties.dtype) if hasattr(value, "size") else None
            for key, value in index.state_dict_metadata.items()
        }
        for index in indices
    ]
    assert found == expected and len(found) > 12
    assert [path.name for path in sorted((ours / "sharded").glob("*.*")) if path.suffix != ".distcp"] == [
        path.name for path in sorted((theirs / "sharded").glob("*.*")) if path.suffix != ".distcp"
    ]
    mcore_to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=10**9)
    tensors = read(tmp_path / "back")
    save_file(tensors, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "reference.safetensors").read_bytes() == (tmp_path / "back/model.safetensors").read_bytes()


def _save_with_manager(hf: Path, root: Path, parallel: ParallelState) -> Path:
    shape = ModelShape.from_folder(hf)
    chunks = build_model(
        shape, MegatronConfig(), dtype=torch.bfloat16, parallel=parallel, kernels="eager", with_ddp=False
    )
    load_hf_folder(chunks, shape, hf, parallel)
    CheckpointManager(root, parallel=parallel, keep=1, assets=hf).save(0, chunks, None, None, {})
    return root / "step_00000000"


class _Killed(BaseException):
    """Passes every handler, as a kill would."""


def die_after(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """The process ends while it writes the file after the first ``files`` ones."""
    original, count = Workspace.fresh, iter(range(10**6))

    def fresh(space: Workspace, path: str) -> Path:
        target = original(space, path)
        if next(count) == files:
            target.write_bytes(b"half a file")
            raise _Killed
        return target

    monkeypatch.setattr(Workspace, "fresh", fresh)


@pytest.mark.parametrize("direction", ["hf-to-mcore", "mcore-to-hf"])
def test_it_goes_on_where_it_was_killed(
    hf: Path, tmp_path: Path, direction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_to_mcore(hf, tmp_path / "mcore", shard_bytes=SHARD)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back", shard_bytes=SHARD)
    reference = weight_files(tmp_path / ("mcore" if direction == "hf-to-mcore" else "back"))
    source = ["--hf", str(hf)] if direction == "hf-to-mcore" else ["--mcore", str(tmp_path / "mcore")]
    out = tmp_path / "new"
    command = ["convert", direction, *source, "--out", str(out), "--shard-size", "8KB"]
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        die_after(patch, 3)
        main(command)
    working = tmp_path / ".new.converting"
    assert not out.exists() and working.is_dir()

    records = sorted((working / "files").glob("*.json"))
    altered = working / "out" / json.loads(records[0].read_text())["path"]
    flip(altered, 0.5)
    capsys.readouterr()
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"{altered.relative_to(working / 'out')} was altered" in told
    assert f"going on: 2 of {told.split(' files, ')[0].split()[-1]} files are complete" in told
    assert weight_files(out) == reference and not working.exists()

    (working / "files").mkdir(parents=True)  # a kill right after the output took its name
    capsys.readouterr()
    assert main(command) == 0 and "complete already" in capsys.readouterr().out and not working.exists()
    assert main([*command[:-1], "9KB"]) == 2 and "not empty" in capsys.readouterr().err


def test_another_conversion_cannot_go_on(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        die_after(patch, 1)
        hf_to_mcore(hf, tmp_path / "mcore", shard_bytes=SHARD)
    with pytest.raises(ValueError, match="left by an unfinished conversion of another source"):
        hf_to_mcore(hf, tmp_path / "mcore", shard_bytes=SHARD + 1)
    file = next(hf.glob("model-00001*"))
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match="of a source that was changed since"):
        hf_to_mcore(hf, tmp_path / "mcore", shard_bytes=SHARD)


def test_only_one_process_writes(hf: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"direction": "x"}
    first, second = Workspace(tmp_path / "out", job), Workspace(tmp_path / "out", job)
    first.open(0)
    with pytest.raises(ValueError, match="another process converts"):
        second.open(0)
    first.close()
    second.open(0)
    second.close()


def test_a_full_disk_is_seen_before_work(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSystem, "free_bytes", lambda self, path: 1000)
    with pytest.raises(ValueError, match="no room for .*mcore: 0.00 GB are still needed and 0.00 GB are free"):
        hf_to_mcore(hf, tmp_path / "mcore")
    assert not list(tmp_path.rglob("*.distcp"))


def test_a_damaged_tensor_is_named(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "model.layers.1.self_attn.k_proj.weight"

    def damage_before_reading(path: Path) -> None:
        tensor = read(hf)[key].view(torch.uint8).numpy().tobytes()[:64]  # rows of one group: contiguous in the file
        data = path.read_bytes()
        if tensor in data:
            path.write_bytes(data.replace(tensor, bytes([tensor[0] ^ 1]) + tensor[1:]))

    with monkeypatch.context() as patch:
        patch.setattr(to_mcore, "forget_cached", damage_before_reading)
        with pytest.raises(ValueError, match=rf"^tensor {key} read back from .* differ from the source"):
            hf_to_mcore(hf, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()

    step = hf_to_mcore(hf, tmp_path / "mcore")
    assert verify(hf, tmp_path / "mcore") == len(read(hf))
    damage_before_reading(step / "sharded" / "__0_0.distcp")
    with pytest.raises(ValueError, match=f"^tensor {key} of .* differ from"):
        verify(hf, tmp_path / "mcore")


def test_recorded_checksums_find_a_damaged_source(hf: Path, tmp_path: Path) -> None:
    hf_to_mcore(hf, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert verify(tmp_path / "back") == len(read(hf))
    flip(tmp_path / "back" / "model.safetensors", 0.9)
    with pytest.raises(ValueError, match="of .* differ from the recorded checksums$"):
        verify(tmp_path / "back")
    with pytest.raises(ValueError, match="the source is damaged"):
        hf_to_mcore(tmp_path / "back", tmp_path / "again")
    with pytest.raises(ValueError, match="no recorded checksums"):
        verify(hf)
    assert not (tmp_path / "mcore" / "step_00000000" / "hf" / "model.checksums.json").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Anonymous memory of processes of their own, a model of 400 MB against one of 2 MB."""

    def peaks(name: str, size: int) -> list[int]:
        folders = [tmp_path / f"{name}_{kind}" for kind in ("hf", "mcore", "back")]
        hf, mcore, back = map(str, folders)
        total = bench_convert.generate(folders[0], size, size // 4)
        ways = (["hf-to-mcore", "--hf", hf, "--out", mcore], ["mcore-to-hf", "--mcore", mcore, "--out", back])
        rows = [bench_convert.convert(name, 1, [*way, "--shard-size", "100MB"], total) for way in ways]
        assert bench_convert.equal_tensors(folders[0], folders[2]) > 20
        return [row.peak_anonymous for row in rows]

    total = 400_000_000
    for large, small in zip(peaks("large", total), peaks("small", 2_000_000), strict=True):
        assert large - small < 0.3 * total
    before = bench_convert.memory(os.getpid())[0]
    with bench_convert.MemoryWatch(os.getpid()) as watch:
        # New pages whatever the allocator of this process kept of earlier tests.
        held = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, total, mmap.PAGESIZE):
            held[start] = 1
        time.sleep(3 * bench_convert.SAMPLE_S)
        held.close()
    assert watch.peak_anonymous - before > 0.8 * total  # the gauge sees a model that is held in memory
    for name in ("hf", "mcore", "back"):
        shutil.rmtree(tmp_path / f"large_{name}")


@pytest.mark.slow
def test_two_ranks_killed_and_started_again(tmp_path: Path) -> None:
    """What the benchmark does with a large model, on a small one: torchrun, SIGKILL, the same command again."""
    total = bench_convert.generate(tmp_path / "hf", 12_000_000, 2_000_000)
    mcore = tmp_path / "mcore"
    command = ["hf-to-mcore", "--hf", str(tmp_path / "hf"), "--out", str(mcore), "--shard-size", "2MB"]
    killed = bench_convert.convert("killed", 2, command, total, kill_in=mcore.with_name(".mcore.converting"))
    assert not any("wrote" in line for line in killed.told) and not mcore.exists()
    again = bench_convert.convert("again", 2, command, total)
    assert any("going on: " in line for line in again.told) and "every tensor was read back" in " ".join(again.told)
    assert 0 < again.peak_anonymous < 2e9
    assert verify(tmp_path / "hf", mcore) > 20
