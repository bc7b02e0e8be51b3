"""Reads global tensors of a distributed checkpoint by rows, straight out of the mapped files.

``torch.distributed.checkpoint`` reads record by record into memory, which for the embedding of a large model means
gigabytes. A record is a file written by ``torch.save``: its tensor lies in one piece, uncompressed, so that the file can
be mapped and rows copied out of it; mapped pages belong to the file, not to this process.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from spear_megatron.model.global_map import GlobalParameter

METADATA_NAME = ".metadata"


class _Part(io.RawIOBase):
    """``length`` bytes of a file from ``offset`` as a file of their own."""

    def __init__(self, stream: IO[bytes], offset: int, length: int) -> None:
        self._stream = stream
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, start + position)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._position)
        data = self._stream.read(max(0, min(len(buffer), self._length - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass(frozen=True)
class _Chunk:
    """One saved part of a global tensor, without the layer dimension: ``data`` are bytes [rows, columns * itemsize]."""

    row: int
    column: int
    num_columns: int
    data: torch.Tensor


class TorchDistReader:
    """The tensors of one folder in megatron-core's ``torch_dist`` format, written at whatever layout."""

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorStorageMetadata],
        storage: dict[MetadataIndex, Any],
        *,
        check_crc: bool = False,
    ) -> None:
        """``tensors`` and ``storage`` as in ``torch.distributed.checkpoint.Metadata``; see :meth:`open`."""
        self.folder = folder
        self._tensors = tensors
        self._storage = storage
        self._files: dict[str, torch.Tensor] = {}
        self._chunks: dict[tuple[str, int | None], list[_Chunk]] = {}
        self._check_crc = check_crc
        self._good: set[MetadataIndex] = set()

    @classmethod
    def open(cls, folder: Path, *, check_crc: bool = False) -> TorchDistReader:
        """Read the index of ``folder``; no tensor is touched.

        Args:
            check_crc: compare every record, when it is first read, with the CRC-32 that ``torch.save`` put into it; for
                a folder that no manifest vouches for.

        Raises:
            ValueError: the folder has no index, or one that cannot be read.
        """
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except FileNotFoundError:
            raise ValueError(f"{folder} has no {METADATA_NAME}: it is no checkpoint in torch_dist format") from None
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise ValueError(f"{folder / METADATA_NAME} is damaged: {error}") from None
        saved = metadata.state_dict_metadata.items()
        tensors = {key: value for key, value in saved if isinstance(value, TensorStorageMetadata)}
        return cls(folder, tensors, metadata.storage_data, check_crc=check_crc)

    def check(self, parameters: Sequence[GlobalParameter]) -> torch.dtype:
        """Check that all parameters are there in the right shape; returns their one dtype.

        Rows of padding may be more or fewer than this package would write.

        Raises:
            ValueError: one is missing or of another shape, or dtypes are mixed; names the key.
        """
        dtypes: dict[torch.dtype, str] = {}
        for parameter in parameters:
            key, layer = self._place(parameter)
            found = tuple(self._tensors[key].size)
            inner = found if layer is None else found[1:]
            rows = sum(segment.length for segment in parameter.segments)
            is_vocabulary = parameter.layer is None and len(parameter.shape) == 2
            fits = inner == parameter.shape or (
                is_vocabulary and inner[1:] == parameter.shape[1:] and inner[0] >= rows
            )
            if not fits:
                raise ValueError(
                    f"tensor {key} in {self.folder} has shape {list(found)}, but config.json asks for "
                    f"{list(parameter.shape)}{'' if layer is None else ' in each layer'}: give the model's own config"
                )
            dtypes.setdefault(self._tensors[key].properties.dtype, key)
        self._check_layers(parameters)
        if len(dtypes) != 1:
            examples = ", ".join(f"{key} is {dtype}" for dtype, key in dtypes.items())
            raise ValueError(f"{self.folder} mixes weight dtypes ({examples})")
        return next(iter(dtypes))

    def rows(self, parameter: GlobalParameter, start: int, length: int) -> torch.Tensor:
        """``length`` rows of a parameter from ``start``: fresh memory, in the checkpoint's dtype.

        Raises:
            ValueError: the saved parts do not cover them, or a record is damaged; names key and file.
        """
        key, layer = self._place(parameter)
        dtype = self._tensors[key].properties.dtype
        width = prod(parameter.shape[1:])
        out = torch.empty(length, width * dtype.itemsize, dtype=torch.uint8)
        covered = 0
        for chunk in self._chunks_of(key, layer, parameter.shape):
            low, high = max(start, chunk.row), min(start + length, chunk.row + chunk.data.shape[0])
            if low < high:
                first = chunk.column * dtype.itemsize
                part = chunk.data[low - chunk.row : high - chunk.row]
                out[low - start : high - start, first : first + part.shape[1]] = part
                covered += (high - low) * chunk.num_columns
        if covered != length * width:
            raise ValueError(f"tensor {key} in {self.folder} is not whole: of rows {start} to {start + length} some lack")
        return out.view(dtype).reshape(length, *parameter.shape[1:])

    def _place(self, parameter: GlobalParameter) -> tuple[str, int | None]:
        for key, layer in parameter.places:
            if key in self._tensors:
                return key, layer
        raise ValueError(f"{self.folder} lacks tensor {parameter.key}, which config.json asks for")

    def _check_layers(self, parameters: Sequence[GlobalParameter]) -> None:
        wanted = 1 + max((parameter.layer for parameter in parameters if parameter.layer is not None), default=-1)
        for parameter in parameters:
            key, layer = self._place(parameter)
            if layer is not None and self._tensors[key].size[0] != wanted:
                raise ValueError(
                    f"tensor {key} in {self.folder} has {self._tensors[key].size[0]} layers, but config.json asks for "
                    f"{wanted}: give the model's own config"
                )

    def _chunks_of(self, key: str, layer: int | None, shape: tuple[int, ...]) -> list[_Chunk]:
        if (key, layer) not in self._chunks:
            found = []
            for chunk in self._tensors[key].chunks:
                offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
                data = None
                if layer is None:
                    data = self._record(key, chunk.offsets, sizes)
                elif offsets[0] <= layer < offsets[0] + sizes[0]:
                    data = self._record(key, chunk.offsets, sizes)
                    each = data.numel() // sizes[0]
                    data = data[(layer - offsets[0]) * each : (layer - offsets[0] + 1) * each]
                    offsets, sizes = offsets[1:], sizes[1:]
                if data is not None:
                    column, columns = (offsets[1], sizes[1]) if len(shape) == 2 else (0, 1)
                    found.append(_Chunk(offsets[0], column, columns, data.view(sizes[0], -1)))
            self._chunks = {(key, layer): found}  # rows are asked for one parameter after the other
        return self._chunks[key, layer]

    def _record(self, key: str, offsets: torch.Size, sizes: tuple[int, ...]) -> torch.Tensor:
        """The bytes of one saved tensor, mapped."""
        dtype = self._tensors[key].properties.dtype
        index = MetadataIndex(key, offsets)
        info = self._storage[index]
        path = self.folder / info.relative_path
        whole = self._map(path)
        problem = f"tensor {key} in {path} is damaged"
        if info.offset + info.length > whole.numel():
            raise ValueError(f"{problem}: the file is too short")
        with open(path, "rb") as stream:
            view = _Part(stream, info.offset, info.length)
            try:
                saved = torch.load(view, map_location="meta", weights_only=True)  # reads the record's head alone
                start = info.offset + saved.untyped_storage()._checkpoint_offset
                crc = _noted_crc(view) if self._check_crc and index not in self._good else None
            except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError, zipfile.BadZipFile) as error:
                raise ValueError(f"{problem}: {' '.join(str(error).split())[:120]}") from None
        size = prod(sizes) * dtype.itemsize
        plain = saved.dtype == dtype and saved.is_contiguous() and saved.storage_offset() == 0
        if not plain or tuple(saved.shape) != sizes or start + size > info.offset + info.length:
            raise ValueError(f"{problem}: it is not the {dtype} tensor of shape {list(sizes)} that the index names")
        data = whole[start : start + size]
        if crc is not None:
            if zlib.crc32(data.numpy()) != crc:
                raise ValueError(f"{problem}: its CRC-32 differs")
            self._good.add(index)
        return data

    def _map(self, path: Path) -> torch.Tensor:
        if path.name not in self._files:
            try:
                size = path.stat().st_size
                self._files[path.name] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
        return self._files[path.name]


def _noted_crc(record: _Part) -> int:
    """CRC-32 of the only tensor in a record, from the record's own table."""
    with zipfile.ZipFile(record) as archive:
        noted = [entry.CRC for entry in archive.infolist() if "/data/" in entry.filename]
    if len(noted) != 1:
        raise ValueError(f"it holds {len(noted)} tensors")
    return noted[0]
