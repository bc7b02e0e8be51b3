"""Corpora on disk, read by memory mapping: Megatron's ``.bin/.idx``, one ``.npy`` per component, or a tar.

``corpus.json`` tells the form, ``samples.npy`` is the table. The other files are

* ``packed``: ``ids.bin`` (int32) and ``loss_mask.bin`` (uint8) with their ``.idx``, as megatron-core's IndexedDataset;
* ``numpy``: ``samples/NNNNNN/NNNNNNNNN.ids.npy`` and ``….loss_mask.npy``, a thousand samples per folder;
* ``webdataset``: ``corpus.tar`` with the raw components ``ids`` (int32) and ``loss_mask`` (uint8), and ``corpus.idx``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spear_megatron.data.corpus import LENGTH, Array, check_sample
from spear_megatron.data.tar_index import TarSample, read_index

FORMAT_VERSION = 1
INFO_NAME, TABLE_NAME = "corpus.json", "samples.npy"
TAR_NAME, TAR_INDEX_NAME = "corpus.tar", "corpus.idx"
COMPONENTS = ("ids", "loss_mask")
DTYPES: tuple[type[np.generic], ...] = (np.int32, np.uint8)
FORMS = ("packed", "numpy", "webdataset")
_PER_FOLDER = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusInfo:
    """What ``corpus.json`` tells.

    Attributes:
        form: one of :data:`FORMS`. source: what the samples were made from.
        content_sha256: of all samples in order. table_sha256: of ``samples.npy``.
        vocabulary_sha256: of the tokenizer that made the ids, see :func:`spear_megatron.data.chat.vocabulary_sha256`.
        files: sizes in bytes of the files beside it, but for those of single samples.
    """

    form: str
    source: str
    num_samples: int
    num_tokens: int
    longest: int
    content_sha256: str
    table_sha256: str
    vocabulary_sha256: str
    files: Mapping[str, int]
    format_version: int = FORMAT_VERSION

    def encode(self) -> bytes:
        """As JSON text."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


class FileCorpus(ABC):
    """A corpus in a folder; see :class:`spear_megatron.data.corpus.Corpus`."""

    def __init__(self, folder: Path, info: CorpusInfo, table: Array) -> None:
        self.folder, self.info, self.table = folder, info, table
        self.name, self.form = str(folder), info.form

    @abstractmethod
    def file_of(self, index: int) -> Path:
        """The file that a sample lies in, for messages."""

    @abstractmethod
    def _load(self, index: int) -> tuple[Array, Array]: ...

    def read(self, index: int) -> tuple[Array, Array]:
        """(ids int32 [n], loss mask uint8 [n]) in mapped memory, checked.

        Raises:
            ValueError: the stored sample is not what was written; names the file.
        """
        try:
            ids, mask = self._load(index)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{self._where(index)} cannot be read ({error}): write the corpus anew") from error
        self.check(index, ids, mask)
        return ids, mask

    def check(self, index: int, ids: Array, loss_mask: Array) -> None:
        """ValueError, naming the file, if the sample differs from what was written."""
        check_sample(self.table[index], ids, loss_mask, self._where(index))

    def identity(self) -> str:
        """SHA-256 of all samples in order."""
        return self.info.content_sha256

    def _where(self, index: int) -> str:
        return f"{self.file_of(index)}: sample {index}"


class PackedCorpus(FileCorpus):
    """All samples behind one another in one file per component."""

    def __init__(self, folder: Path, info: CorpusInfo, table: Array) -> None:
        super().__init__(folder, info, table)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._parts = []
        for component, dtype in zip(COMPONENTS, DTYPES, strict=True):
            try:
                part = IndexedDataset(str(folder / component), mmap=True)
            except (AssertionError, ValueError, KeyError, OSError) as error:
                raise ValueError(f"{folder / component}.idx is damaged ({error}): write the corpus anew") from error
            if len(part) != len(table) or part.index.dtype != dtype:
                raise ValueError(
                    f"{folder / component}.idx lists {len(part)} samples of {np.dtype(part.index.dtype)} instead of "
                    f"{len(table)} of {np.dtype(dtype)}: write the corpus anew"
                )
            self._parts.append(part)

    def file_of(self, index: int) -> Path:
        """Both components are checked together."""
        return self.folder / "ids.bin, loss_mask.bin"

    def _load(self, index: int) -> tuple[Array, Array]:
        ids, mask = (part[index] for part in self._parts)
        return ids, mask


class NumpyCorpus(FileCorpus):
    """Two ``.npy`` files per sample."""

    def file_of(self, index: int) -> Path:
        """Both components are checked together."""
        ids, mask = self.files(index)
        return ids.with_name(f"{ids.name}, {mask.name}")

    def files(self, index: int) -> tuple[Path, Path]:
        """The files of one sample."""
        ids, mask = (sample_file(self.folder, index, component) for component in COMPONENTS)
        return ids, mask

    def _load(self, index: int) -> tuple[Array, Array]:
        parts = []
        for path, dtype in zip(self.files(index), DTYPES, strict=True):
            part = np.load(path, allow_pickle=False)
            if part.dtype != dtype or part.ndim != 1:
                raise ValueError(f"{path.name} holds {part.dtype} of {part.ndim} dimensions, not {np.dtype(dtype)} [n]")
            parts.append(part)
        return parts[0], parts[1]


class TarCorpus(FileCorpus):
    """One tar of raw components."""

    def __init__(self, folder: Path, info: CorpusInfo, table: Array) -> None:
        super().__init__(folder, info, table)
        path = folder / TAR_NAME
        self.samples: list[TarSample] = read_index(folder / TAR_INDEX_NAME, COMPONENTS, path.stat().st_size)
        for number, sample in enumerate(self.samples):
            sizes = [part.num_bytes // np.dtype(dtype).itemsize for part, dtype in zip(sample, DTYPES, strict=True)]
            if number < len(table) and sizes != [int(table[number, LENGTH])] * 2:
                raise ValueError(f"{folder / TAR_INDEX_NAME}: sample {number} has another length than in {TABLE_NAME}")
        if len(self.samples) != len(table):
            raise ValueError(f"{folder / TAR_INDEX_NAME} lists {len(self.samples)} samples instead of {len(table)}")
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")

    def file_of(self, index: int) -> Path:
        """The tar."""
        return self.folder / TAR_NAME

    def _load(self, index: int) -> tuple[Array, Array]:
        ids, mask = (self._bytes[part.offset : part.offset + part.num_bytes] for part in self.samples[index])
        return ids.view(np.int32), mask


def sample_file(folder: Path, index: int, component: str) -> Path:
    """Path of one component of one sample in the form ``numpy``."""
    return folder / "samples" / f"{index // _PER_FOLDER:06d}" / f"{index:09d}.{component}.npy"


def is_corpus(path: Path) -> bool:
    """Whether a folder is a corpus."""
    return (path / INFO_NAME).is_file()


_CLASSES: Mapping[str, type[FileCorpus]] = {"packed": PackedCorpus, "numpy": NumpyCorpus, "webdataset": TarCorpus}


def open_corpus(folder: Path) -> FileCorpus:
    """Open what :func:`spear_megatron.data.corpus_write.write_corpus` wrote.

    Sizes and the table are checked here, every sample when it is read.

    Raises:
        ValueError: the folder is no corpus, is of a newer version, or a file is missing or has another size.
    """
    import hashlib

    info = _read_info(folder)
    for name, size in info.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{path} {state}: write the corpus anew")
    data = (folder / TABLE_NAME).read_bytes()
    if hashlib.sha256(data).hexdigest() != info.table_sha256:
        raise ValueError(f"{folder / TABLE_NAME} was changed since it was written: write the corpus anew")
    table = np.load(folder / TABLE_NAME, allow_pickle=False)
    return _CLASSES[info.form](folder, info, table)


def _read_info(folder: Path) -> CorpusInfo:
    path = folder / INFO_NAME
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no corpus ({error}): make one with the command 'corpus'") from error
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not of format_version {FORMAT_VERSION}, which this code reads")
    if set(values) != set(CorpusInfo.__dataclass_fields__) or values["form"] not in FORMS:
        raise ValueError(f"{path} is damaged: it must hold {', '.join(CorpusInfo.__dataclass_fields__)}")
    return CorpusInfo(**values)
