"""A corpus of tokenised conversations: what its samples are known by, and one that is held in memory."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from spear_megatron.data.packing import packed_length
from spear_megatron.data.sft import SftExample

Array = np.ndarray[Any, Any]
LENGTH, PACKED, CHECKSUM = range(3)
"""Columns of a corpus' table: tokens, positions that training needs, CRC-32 of the bytes of ids and mask."""


class Corpus(Protocol):
    """Samples of int32 ids and uint8 loss masks by index, whatever they are stored as.

    Attributes:
        name: folder or description, for messages. form: memory, packed, numpy or webdataset.
        table: int64 [samples, 3], the columns :data:`LENGTH`, :data:`PACKED` and :data:`CHECKSUM`.
    """

    name: str
    form: str
    table: Array

    def read(self, index: int) -> tuple[Array, Array]:
        """(ids int32 [n], loss mask uint8 [n]) of one sample, checked; may lie in memory that must not be written.

        Raises:
            ValueError: what is stored is not what was written; names the file.
        """

    def check(self, index: int, ids: Array, loss_mask: Array) -> None:
        """Hold what somebody else has read against the table.

        Raises:
            ValueError: it differs; names the file.
        """

    def identity(self) -> str:
        """SHA-256 of all samples in order: equal for equal content in any form."""


class ContentHash:
    """SHA-256 over samples, and their rows of the table."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._rows: list[tuple[int, int, int]] = []

    def add(self, example: SftExample, where: str) -> tuple[Array, Array]:
        """Count one sample in; returns its ids and mask as they are stored.

        Raises:
            ValueError: ids and mask differ in length, there are none, or the first token is to be learned.
        """
        ids = np.ascontiguousarray(example.ids.numpy(), dtype=np.int32)
        mask = np.ascontiguousarray(example.loss_mask.numpy(), dtype=np.uint8)
        if ids.ndim != 1 or ids.shape != mask.shape or not len(ids):
            raise ValueError(f"{where}: {ids.shape} ids and a mask of {mask.shape}: give one mask value per token")
        try:
            packed = packed_length(example.loss_mask)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        self._rows.append((len(ids), packed, sample_checksum(ids, mask)))
        for part in (np.int64(len(ids)).tobytes(), ids.data, mask.data):
            self._hash.update(part)
        return ids, mask

    def table(self) -> Array:
        """int64 [samples, 3]."""
        return np.array(self._rows, dtype=np.int64).reshape(-1, 3)

    def hexdigest(self) -> str:
        """The identity of what was added."""
        return self._hash.hexdigest()


class MemoryCorpus:
    """Examples that are in memory already."""

    form = "memory"

    def __init__(self, examples: Iterable[SftExample], name: str = "the conversations in memory") -> None:
        self.name = name
        content = ContentHash()
        self._samples = [content.add(example, f"{name}: sample {i}") for i, example in enumerate(examples)]
        self.table = content.table()
        self._identity = content.hexdigest()

    def read(self, index: int) -> tuple[Array, Array]:
        """The sample itself."""
        return self._samples[index]

    def check(self, index: int, ids: Array, loss_mask: Array) -> None:
        """ValueError if the sample differs."""
        check_sample(self.table[index], ids, loss_mask, f"{self.name}: sample {index}")

    def identity(self) -> str:
        """SHA-256 of all samples in order."""
        return self._identity


def sample_checksum(ids: Array, loss_mask: Array) -> int:
    """CRC-32 of the bytes of ids (int32) and mask (uint8), both contiguous."""
    return zlib.crc32(loss_mask.data, zlib.crc32(ids.data))


def check_sample(row: Array, ids: Array, loss_mask: Array, where: str) -> None:
    """Hold one sample against its row of the table.

    Raises:
        ValueError: length or content differs.
    """
    expected = int(row[LENGTH])
    if len(ids) != expected or len(loss_mask) != expected:
        raise ValueError(
            f"{where}: {len(ids)} ids and {len(loss_mask)} mask values instead of {expected} each: "
            "the file was changed or cut; write the corpus anew"
        )
    if sample_checksum(ids, loss_mask) != int(row[CHECKSUM]):
        raise ValueError(f"{where}: the checksum differs: the file was changed or damaged; write the corpus anew")


def examples_of(corpus: Corpus, indices: Sequence[int] | None = None) -> Iterable[SftExample]:
    """The samples as tensors of their own, in order or as named by ``indices``."""
    for index in range(len(corpus.table)) if indices is None else indices:
        ids, mask = corpus.read(index)
        yield SftExample(torch.from_numpy(ids.copy()), torch.from_numpy(mask.astype(np.bool_)))
