"""Megatron checkpoint -> Hugging Face folder, file by file: rows are read from mapped records and written once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from spear_megatron.checkpoint import assets
from spear_megatron.checkpoint.conversion.tensors import (
    Count,
    checksum,
    differing,
    forget_cached,
    from_checkpoint,
    from_folder,
    named,
    raw_bytes,
    write_checksums,
)
from spear_megatron.checkpoint.conversion.torch_dist import TorchDistReader
from spear_megatron.checkpoint.conversion.workspace import Record, Workspace
from spear_megatron.model.global_map import global_parameters, segments_of
from spear_megatron.model.hf_export import plan_shards, shard_name, write_config, write_index
from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.shape import ModelShape
from spear_megatron.observability.files import sync_path

SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class SafetensorsFile:
    """One file of the folder and its tensors, in the order in which safetensors lays them out."""

    path: str
    names: list[str]
    num_bytes: int


def plan_files(shape: ModelShape, dtype: torch.dtype, max_bytes: int) -> list[SafetensorsFile]:
    """The files of the folder, cut as ``hf_export`` cuts them."""
    shards, shapes = plan_shards(shape, dtype, max_bytes), shape.parameter_shapes()
    return [
        SafetensorsFile(
            shard_name(number, len(shards)),
            sorted(names),
            sum(prod(shapes[name]) for name in names) * dtype.itemsize,
        )
        for number, names in enumerate(shards, start=1)
    ]


class ToHF:
    """Writes, compares and completes the files of one folder."""

    def __init__(self, reader: TorchDistReader, shape: ModelShape, space: Workspace, dtype: torch.dtype) -> None:
        self._reader = reader
        self._shapes = shape.parameter_shapes()
        self._segments = segments_of(global_parameters(shape))
        self._space = space
        self._dtype = dtype

    def path(self, file: SafetensorsFile) -> str:
        """Path of a file in the working folder's output."""
        return file.path

    def write(self, file: SafetensorsFile, count: Count) -> Record:
        """Write one file from the mapped records; durable when it returns."""
        tensors = {}
        with self._space.files.create(self._space.fresh(file.path)) as stream:
            stream.write(header({name: self._shapes[name] for name in file.names}, self._dtype))
            for name in file.names:
                digest = hashlib.sha256()
                for rows in from_checkpoint(self._reader, self._segments[name], self._dtype):
                    data = raw_bytes(rows)
                    digest.update(data)
                    count(stream.write(data))
                tensors[name] = digest.hexdigest()
        entry = stream.entry(file.path)
        return Record(file.path, entry.num_bytes, entry.sha256, tensors, [])

    def compare(self, file: SafetensorsFile, record: Record, count: Count) -> None:
        """Read the file back from disk, tensor by tensor.

        Raises:
            ValueError: a tensor is not what was read from the checkpoint; names it.
        """
        path = self._space.result / file.path
        forget_cached(path)
        with HFWeights(self._space.result, dict.fromkeys(file.names, path)) as weights:
            found = {
                name: checksum(from_folder(weights, name, self._shapes[name], self._dtype.itemsize), count)
                for name in file.names
            }
        wrong = differing(found, record.tensors)
        if wrong:
            raise ValueError(f"{named(wrong)} read back from {path} differ from the checkpoint")

    def complete(self, records: list[Record], source: Path, config_dtype: torch.dtype | None) -> None:
        """Write index, checksums, config and tokenizer beside the weights.

        Args:
            source: folder with ``config.json`` and tokenizer, copied as they are.
            config_dtype: declare this dtype in ``config.json``; None leaves the file as it is.
        """
        out = self._space.result
        if len(records) > 1:
            total = sum(prod(shape) for shape in self._shapes.values()) * self._dtype.itemsize
            write_index(out, {name: record.path for record in records for name in record.tensors}, total)
        write_checksums(out, self._space.job_id, {k: v for record in records for k, v in record.tensors.items()})
        for path in assets.asset_files(source):
            target = out / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        if config_dtype is not None:
            write_config(source, out, config_dtype)
        for path in [*out.rglob("*"), out]:
            sync_path(path)


def header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Head of a safetensors file of these tensors, one after the other: its length in 8 bytes, then padded JSON."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        described[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
