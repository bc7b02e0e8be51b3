"""Hugging Face folder -> Megatron checkpoint, file by file: rows are read from mapped safetensors and written once."""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from spear_megatron.checkpoint import assets, sharded, states
from spear_megatron.checkpoint.conversion.tensors import (
    Count,
    checksum,
    differing,
    forget_cached,
    from_checkpoint,
    named,
    pieces,
    raw_bytes,
)
from spear_megatron.checkpoint.conversion.torch_dist import TorchDistReader
from spear_megatron.checkpoint.conversion.workspace import Record, Workspace
from spear_megatron.checkpoint.manifest import SHARDED, Manifest, StateEntry
from spear_megatron.checkpoint.store import CheckpointStore
from spear_megatron.data.files import FileEntry
from spear_megatron.model.global_map import GlobalParameter, extra_state_keys, segments_of
from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.shape import ModelShape

STATE = "conversion"


@dataclass(frozen=True)
class DistFile:
    """One file of the checkpoint and the parameters that go into it."""

    path: str
    parameters: list[GlobalParameter]
    num_bytes: int


def plan_files(parameters: list[GlobalParameter], dtype: torch.dtype, max_bytes: int) -> list[DistFile]:
    """Parameters in files of at most ``max_bytes``; one larger parameter makes a file of its own."""
    groups: list[list[GlobalParameter]] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel * dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(parameter)
        room -= size
    sizes = [sum(parameter.numel for parameter in group) * dtype.itemsize for group in groups]
    return [
        DistFile(f"{sharded.FOLDER}/__{number}_0.distcp", group, size)
        for number, (group, size) in enumerate(zip(groups, sizes))
    ]


class ToMcore:
    """Writes, compares and completes the files of one checkpoint."""

    def __init__(
        self, weights: HFWeights, shape: ModelShape, space: Workspace, hf_dtype: torch.dtype, dtype: torch.dtype
    ) -> None:
        """``hf_dtype`` is that of the folder, ``dtype`` that of the checkpoint, which holds every value of it."""
        self._weights = weights
        self._shape = shape
        self._space = space
        self._hf_dtype = hf_dtype
        self._dtype = dtype
        self._store = CheckpointStore(space.result)

    def path(self, file: DistFile) -> str:
        """Path of a file in the working folder's output."""
        return f"{self._store.staging_path(0).name}/{file.path}"

    def write(self, file: DistFile, count: Count) -> Record:
        """Write one file from the mapped source; durable when it returns."""
        hashes = {segment.hf_name: hashlib.sha256() for parameter in file.parameters for segment in parameter.segments}
        parts = []
        with self._space.files.create(self._space.fresh(self.path(file))) as stream:
            for parameter in file.parameters:
                for start, length in pieces(parameter.shape[0], prod(parameter.shape[1:]) * self._dtype.itemsize):
                    rows = self._rows(parameter, start, length, hashes)
                    prefix = [] if parameter.layer is None else [parameter.layer]
                    sizes = [1] * len(prefix) + list(rows.shape)
                    begin = stream.tell()
                    torch.save(rows.view(sizes), stream)
                    offsets = [*prefix, start, *[0] * (len(parameter.shape) - 1)]
                    parts.append([parameter.key, offsets, sizes, begin, stream.tell() - begin])
                    count(rows.nbytes)
        entry = stream.entry(file.path)
        tensors = {name: digest.hexdigest() for name, digest in hashes.items()}
        return Record(self.path(file), entry.num_bytes, entry.sha256, tensors, parts)

    def compare(self, file: DistFile, record: Record, count: Count) -> None:
        """Read the file back from disk, tensor by tensor.

        Raises:
            ValueError: a tensor is not what was read from the source; names it.
        """
        path = self._space.result / record.path
        forget_cached(path)
        reader = _reader(path, record, self._dtype)
        found = {
            name: checksum(from_checkpoint(reader, places, self._hf_dtype), count)
            for name, places in segments_of(file.parameters).items()
        }
        wrong = differing(found, record.tensors)
        if wrong:
            raise ValueError(f"{named(wrong)} read back from {path} differ from the source")

    def complete(self, records: list[Record], hf: Path, layout: dict[str, int], software: dict[str, str]) -> None:
        """Write index, states, config and tokenizer, and make it a checkpoint of step 0 in the output folder."""
        if self._store.path(0).exists():
            return
        staging, files = self._store.staging_path(0), self._space.files
        for name in (states.FOLDER, assets.FOLDER):
            shutil.rmtree(staging / name, ignore_errors=True)
            files.mkdir(staging / name)
        entries = [FileEntry(_inside(record.path), record.num_bytes, record.sha256) for record in records]
        entries += self._write_index(staging / sharded.FOLDER, records)
        tensors = {name: value for record in records for name, value in record.tensors.items()}
        told = {
            "dtype": str(self._hf_dtype).removeprefix("torch."),
            **layout,
            "job": self._space.job_id,
            "tensors": dict(sorted(tensors.items())),
        }
        entry, data = states.encode_state(STATE, told)
        entries.append(files.write(staging / entry.path, data, entry.path))
        entries += assets.copy_assets(hf, staging / assets.FOLDER, files)
        manifest = Manifest(
            step=0,
            fingerprint="",
            layout=dict.fromkeys(("world_size", "tp", "pp", "vpp", "cp", "dp"), 1),
            software=software,
            states={"model": StateEntry(SHARDED, sharded.FOLDER), STATE: entry},
            files=tuple(sorted(entries, key=lambda entry: entry.path)),
        )
        self._store.commit(0, manifest)

    def _rows(
        self, parameter: GlobalParameter, start: int, length: int, hashes: dict[str, hashlib._Hash]
    ) -> torch.Tensor:
        rows = torch.zeros(length, *parameter.shape[1:], dtype=self._dtype)
        for segment in parameter.segments:
            low, high = max(start, segment.start), min(start + length, segment.start + segment.length)
            if low < high:
                first = segment.hf_start + low - segment.start
                read = self._weights.read(segment.hf_name, 0, first, high - low)
                hashes[segment.hf_name].update(raw_bytes(read))  # the rows of one tensor come in its own order
                rows[low - start : high - start] = read
        return rows

    def _write_index(self, folder: Path, records: list[Record]) -> list[FileEntry]:
        for name in (sharded.COMMON_NAME, ".metadata", "metadata.json", _extra_name(records)):
            (folder / name).unlink(missing_ok=True)
        files, extra = self._space.files, extra_state_keys(self._shape)
        results = [
            WriteResult(
                MetadataIndex(key, torch.Size(offsets)), length, _StorageInfo(Path(record.path).name, begin, length)
            )
            for record in records
            for key, offsets, _, begin, length in record.parts
        ]
        nothing = io.BytesIO()
        torch.save([None], nothing)  # Megatron packs objects in lists
        name = _extra_name(records)
        with files.create(folder / name) as stream:
            for key in extra:
                begin = stream.tell()
                size = stream.write(nothing.getbuffer())
                results.append(WriteResult(MetadataIndex(key), size, _StorageInfo(name, begin, size)))
        entries = [stream.entry(f"{sharded.FOLDER}/{name}")]
        common = io.BytesIO()
        torch.save({}, common)
        entries.append(
            files.write(folder / sharded.COMMON_NAME, common.getvalue(), f"{sharded.FOLDER}/{sharded.COMMON_NAME}")
        )
        described = describe_tensors([part for record in records for part in record.parts], self._dtype)
        metadata = Metadata(state_dict_metadata=described | {key: BytesStorageMetadata() for key in extra})
        return entries + sharded.complete_save(folder, metadata, [results])


def describe_tensors(parts: list[list], dtype: torch.dtype) -> dict[str, TensorStorageMetadata]:
    """Key -> what torch.distributed.checkpoint wants to know of a global tensor that consists of these parts."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for key, offsets, sizes, _, _ in parts:
        chunks.setdefault(key, []).append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return {
        key: TensorStorageMetadata(
            TensorProperties(dtype=dtype),
            torch.Size(
                [max(chunk.offsets[dim] + chunk.sizes[dim] for chunk in found) for dim in range(len(found[0].sizes))]
            ),
            found,
        )
        for key, found in chunks.items()
    }


def _reader(path: Path, record: Record, dtype: torch.dtype) -> TorchDistReader:
    """Of one file whose index is not written yet."""
    storage = {
        MetadataIndex(key, torch.Size(offsets)): _StorageInfo(path.name, begin, length)
        for key, offsets, _, begin, length in record.parts
    }
    return TorchDistReader(path.parent, describe_tensors(record.parts, dtype), storage)


def _inside(path: str) -> str:
    return path.split("/", 1)[1]


def _extra_name(records: list[Record]) -> str:
    return f"__{len(records)}_0.distcp"
