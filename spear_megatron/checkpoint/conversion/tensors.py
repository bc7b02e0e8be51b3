"""Hugging Face tensors piece by piece, from a folder or out of a checkpoint, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from spear_megatron.checkpoint.conversion.torch_dist import TorchDistReader
from spear_megatron.model.global_map import GlobalParameter, Segment
from spear_megatron.model.hf_folder import HFWeights

PIECE_BYTES = 32 << 20
CHECKSUMS_NAME = "model.checksums.json"
_FORMAT = "spear_megatron tensor checksums"
Count = Callable[[int], None]


def pieces(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of consecutive pieces of at most ``PIECE_BYTES``, or of one row."""
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def raw_bytes(rows: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(rows.reshape(-1).view(torch.uint8).numpy())


def from_checkpoint(
    reader: TorchDistReader, places: Sequence[tuple[GlobalParameter, Segment]], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The rows of one Hugging Face tensor (``global_map.segments_of``) in order, as ``dtype``.

    Raises:
        ValueError: as ``TorchDistReader.rows``.
    """
    for parameter, segment in places:
        for start, length in pieces(segment.length, prod(parameter.shape[1:]) * dtype.itemsize):
            yield reader.rows(parameter, segment.start + start, length).to(dtype)


def from_folder(weights: HFWeights, name: str, shape: tuple[int, ...], itemsize: int) -> Iterator[torch.Tensor]:
    """The rows of one tensor of a Hugging Face folder in order."""
    for start, length in pieces(shape[0], prod(shape[1:]) * itemsize):
        yield weights.read(name, 0, start, length)


def checksum(parts: Iterator[torch.Tensor], count: Count) -> str:
    """SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(raw_bytes(part))
        count(part.nbytes)
    return digest.hexdigest()


def forget_cached(path: Path) -> None:
    """Let the system drop what it holds of a durable file in memory, so that reading it back reads the disk."""
    with open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def differing(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Names whose checksums differ, or that only one side has."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def named(names: Sequence[str]) -> str:
    """The first names of a list of tensors, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def write_checksums(folder: Path, job: str, tensors: Mapping[str, str]) -> None:
    """Write ``model.checksums.json`` into a Hugging Face folder."""
    body: dict[str, Any] = {"format": _FORMAT, "version": 1, "job": job, "algorithm": "sha256"}
    body["tensors"] = dict(sorted(tensors.items()))
    (folder / CHECKSUMS_NAME).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, Any] | None:
    """The content of ``model.checksums.json``, None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(body, dict) or body.get("format") != _FORMAT or not isinstance(body.get("tensors"), dict):
        raise ValueError(f"{path} is no list of tensor checksums: remove it")
    return body
