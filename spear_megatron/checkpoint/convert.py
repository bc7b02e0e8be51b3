"""Conversion between a Hugging Face folder and a Megatron checkpoint: bit for bit, streamed, shared by all ranks.

Files of the output are the units of work. Whichever rank is free takes the next one, reads its tensors row by row from
the mapped source, writes it, reads it back from disk and compares every tensor's checksum with the source's. No model
is built, and neither the number of ranks nor an interruption changes a byte of the tensors.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from spear_megatron.checkpoint.conversion.ranks import Crew, Say
from spear_megatron.checkpoint.conversion.sources import check_arguments, find_source
from spear_megatron.checkpoint.conversion.tensors import (
    Count,
    checksum,
    differing,
    from_checkpoint,
    from_folder,
    named,
    read_checksums,
)
from spear_megatron.checkpoint.conversion.to_hf import SAFETENSORS_NAMES, ToHF
from spear_megatron.checkpoint.conversion.to_hf import plan_files as plan_hf
from spear_megatron.checkpoint.conversion.to_mcore import STATE, ToMcore
from spear_megatron.checkpoint.conversion.to_mcore import plan_files as plan_mcore
from spear_megatron.checkpoint.conversion.torch_dist import TorchDistReader
from spear_megatron.checkpoint.conversion.workspace import Record, Workspace, check_new
from spear_megatron.checkpoint.locate import checkpoint_folders
from spear_megatron.checkpoint.manifest import Manifest, check_files, read_manifest
from spear_megatron.checkpoint.states import decode_states
from spear_megatron.checkpoint.store import step_name
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.device.platform import Platform
from spear_megatron.model.global_map import global_parameters, segments_of
from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.transformer_config import check_layout
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.state import initialize

SHARD_BYTES = 10**9
"""Default size of the files written, and with it of what an interruption can cost."""
OVERHEAD = 1.01
"""Space for indices, tokenizer and records, beside the weights."""
STEP_NAME = step_name(0)


class _File(Protocol):
    @property
    def num_bytes(self) -> int: ...


class _Work(Protocol):
    def path(self, file: Any) -> str: ...

    def write(self, file: Any, count: Count) -> Record: ...

    def compare(self, file: Any, record: Record, count: Count) -> None: ...


def hf_to_mcore(
    hf: Path, out: Path, *, tp: int = 1, pp: int = 1, shard_bytes: int = SHARD_BYTES, say: Say = lambda text: None
) -> Path:
    """Write the weights of a Hugging Face folder, its config and its tokenizer as a checkpoint of step 0 in ``out``.

    Started under ``torchrun``, the ranks share the work (collective). Called again after an interruption it goes on
    with the files that are missing; called again after the end it says so.

    Args:
        tp, pp: the layout it is meant for: checked against the model and recorded. A checkpoint loads at any layout,
            so the bytes do not depend on it.
        shard_bytes: size of the files written.
        say: told how it goes, in lines of text, on rank 0.

    Returns:
        The step folder.

    Raises:
        ValueError: ``out`` is not empty, the folder is no model, its weights mix dtypes or differ from their recorded
            checksums, the layout does not fit, or there is no room.
        CheckpointError: it could not be written.
    """
    shape = ModelShape.from_folder(hf)
    check_layout(shape, MegatronConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    weights = HFWeights.open(hf, shape)
    hf_dtype = _weights_dtype(hf, weights)
    # Half precision is not trained in; float32 holds it exactly.
    dtype = torch.float32 if hf_dtype == torch.float16 else hf_dtype
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    files = sorted({*weights.files.values(), hf / "config.json"})
    job = {
        "direction": "hf-to-mcore",
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "shard_bytes": shard_bytes,
        **layout,
    }
    with _crew(say) as crew, weights:
        space = Workspace(out, job)
        if _is_done(crew, space, lambda: _job_of_checkpoint(out)):
            return out / STEP_NAME
        work = ToMcore(weights, shape, space, hf_dtype, dtype)
        plan = plan_mcore(global_parameters(shape), dtype, shard_bytes)
        _convert(crew, space, work, plan, (read_checksums(hf) or {}).get("tensors"), hf)
        software = {name: importlib.metadata.version(name) for name in ("spear-megatron", "megatron-core", "torch")}

        def complete() -> None:
            work.complete(_records(space, work, plan), hf, layout, software)
            space.publish()

        crew.on_first("complete", complete)
        return out / STEP_NAME


def mcore_to_hf(
    mcore: Path,
    out: Path,
    *,
    hf_config: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Say = lambda text: None,
) -> Path:
    """Write a checkpoint (``find_source`` says what may be given) as a Hugging Face folder, in its own dtype.

    Ranks, interruptions, ``shard_bytes`` and ``say`` as in :func:`hf_to_mcore`.

    Args:
        hf_config: folder with ``config.json`` and tokenizer, for a checkpoint that brings none.

    Returns:
        The folder that was converted.

    Raises:
        ValueError: ``out`` is not empty, there is no usable checkpoint with a model's config, a tensor is missing,
            misshapen, damaged or not what its recorded checksum says, or there is no room.
        CheckpointError: ``out`` could not be written.
    """
    with _crew(say) as crew:
        source = find_source(mcore, hf_config, _shared_check(crew))
        shape = ModelShape.from_folder(source.config)
        if source.by_megatron_lm:
            check_arguments(source.folder, shape)
        reader = TorchDistReader.open(source.sharded, check_crc=source.by_megatron_lm)
        dtype = reader.check(global_parameters(shape))
        if source.conversion:
            dtype = getattr(torch, source.conversion["dtype"])
        config = hashlib.sha256((source.config / "config.json").read_bytes()).hexdigest()
        job = {"direction": "mcore-to-hf", "source": source.identity, "config": config, "shard_bytes": shard_bytes}
        space = Workspace(out, job)
        if _is_done(crew, space, lambda: (read_checksums(out) or {}).get("job")):
            return source.folder
        work = ToHF(reader, shape, space, dtype)
        plan = plan_hf(shape, dtype, shard_bytes)
        _convert(crew, space, work, plan, (source.conversion or {}).get("tensors"), source.folder)

        def complete() -> None:
            records = _records(space, work, plan)
            work.complete(records, source.config, None if source.conversion else dtype)
            space.publish()

        crew.on_first("complete", complete)
        return source.folder


def verify(hf: Path, mcore: Path | None = None, *, say: Say = lambda text: None) -> int:
    """Compare a Hugging Face folder, tensor by tensor, with a checkpoint or with its own recorded checksums.

    Returns:
        The number of tensors, all of them equal.

    Raises:
        ValueError: some differ, are missing or cannot be read; names them. Or there is nothing to compare with.
    """
    shape = ModelShape.from_folder(hf)
    weights = HFWeights.open(hf, shape)
    dtype = _weights_dtype(hf, weights)
    names, shapes = list(shape.parameter_shapes()), shape.parameter_shapes()
    total_bytes = shape.num_parameters() * dtype.itemsize * (1 if mcore is None else 2)
    recorded = (read_checksums(hf) or {}).get("tensors") if mcore is None else None
    if mcore is None and recorded is None:
        raise ValueError(f"{hf} has no recorded checksums: give a checkpoint to compare it with (--mcore)")
    with _crew(say) as crew, weights, crew.progress("verify", total_bytes) as count:
        mine = names[crew.parallel.rank :: crew.parallel.world_size]

        def hashes() -> tuple[dict[str, str], dict[str, str]]:
            ours = {
                name: checksum(from_folder(weights, name, shapes[name], dtype.itemsize), count) for name in mine
            }
            if mcore is None:
                return ours, {name: value for name, value in (recorded or {}).items() if name in mine}
            parameters = global_parameters(shape)
            reader = TorchDistReader.open(find_source(mcore, hf, None).sharded)
            reader.check(parameters)
            places = segments_of(parameters)
            return ours, {name: checksum(from_checkpoint(reader, places[name], dtype), count) for name in mine}

        parts = crew.together("verify", hashes)
    found, theirs = ({n: v for part in parts for n, v in part[side].items()} for side in (0, 1))
    wrong = differing(found, theirs)
    if wrong:
        raise ValueError(f"{named(wrong)} of {hf} differ from {mcore or 'the recorded checksums'}")
    return len(found)


def _convert(
    crew: Crew,
    space: Workspace,
    work: _Work,
    files: Sequence[_File],
    expected: Mapping[str, str] | None,
    source: Path,
) -> None:
    """Write and compare every file that is not there yet. Collective."""
    total = sum(file.num_bytes for file in files)
    crew.on_first("open", lambda: space.open(int(total * OVERHEAD)))
    rank, world_size = crew.parallel.rank, crew.parallel.world_size
    paths = [work.path(file) for file in files]
    reports = crew.together("resume", lambda: space.kept(paths, rank, world_size))
    intact = {path for kept, _ in reports for path in kept}
    for path in sorted(path for _, altered in reports for path in altered):
        crew.say(f"{path} was altered since it was written: it is written again")
    left = sorted((file for file in files if work.path(file) not in intact), key=lambda file: -file.num_bytes)
    if intact:
        crew.say(f"going on: {len(intact)} of {len(files)} files are complete and their checksums match")
    todo = sum(file.num_bytes for file in left)

    def convert() -> None:
        for number in crew.claims("convert", len(left)):
            record = work.write(left[number], count)
            if expected is not None:
                wrong = [name for name, value in record.tensors.items() if expected.get(name) != value]
                if wrong:
                    raise ValueError(
                        f"{named(wrong)} of {source} differ from the recorded checksums: the source is damaged (or was "
                        "changed on purpose; then remove model.checksums.json)"
                    )
            work.compare(left[number], record, count)
            space.finish(record)

    with crew.progress("written and read back", 2 * todo) as count:
        crew.together("convert", convert)
    crew.say(f"{len(files)} files, {total / 1e9:.2f} GB: every tensor was read back and equals the source")


def _records(space: Workspace, work: _Work, files: Sequence[_File]) -> list[Record]:
    found = [space.record(work.path(file)) for file in files]
    return [record for record in found if record is not None]


def _is_done(crew: Crew, space: Workspace, job: Callable[[], str | None]) -> bool:
    """Whether the output is there already, of this very job; an output of another one is refused."""

    def look() -> bool:
        if space.out.is_dir() and job() == space.job_id:
            space.clear()
            return True
        check_new(space.out)
        return False

    done = crew.on_first("look", look)
    if done:
        crew.say(f"{space.out} is complete already")
    return done


def _job_of_checkpoint(out: Path) -> str | None:
    if out / STEP_NAME not in checkpoint_folders(out):
        return None
    conversion = decode_states(out / STEP_NAME, read_manifest(out / STEP_NAME)).get(STATE) or {}
    return conversion.get("job")


def _shared_check(crew: Crew) -> Callable[[Path, Manifest], list[str]]:
    """``check_files`` with the files dealt to the ranks. Collective."""
    rank, world_size = crew.parallel.rank, crew.parallel.world_size

    def check(folder: Path, manifest: Manifest) -> list[str]:
        crew.say(f"checking {manifest.num_bytes / 1e9:.2f} GB of {folder} against its manifest")
        parts = crew.together(f"check {folder}", lambda: check_files(folder, manifest, rank, world_size))
        return [problem for part in parts for problem in part]

    return check


def _weights_dtype(hf: Path, weights: HFWeights) -> torch.dtype:
    from safetensors import safe_open

    known = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
    found: dict[str, str] = {}
    for file in sorted(set(weights.files.values())):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found.setdefault(opened.get_slice(name).get_dtype(), name)
    if len(found) != 1:
        example = ", ".join(f"{name} is {dtype}" for dtype, name in sorted(found.items()))
        raise ValueError(f"{hf} mixes dtypes ({example}): convert all weights to one of them first")
    return known[next(iter(found))]


@contextmanager
def _crew(say: Say) -> Iterator[Crew]:
    with megatron_on_cpu():
        parallel = initialize(platform=Platform(device=torch.device("cpu"), backend="gloo"))
        try:
            yield Crew(parallel, say)
        finally:
            parallel.destroy()
