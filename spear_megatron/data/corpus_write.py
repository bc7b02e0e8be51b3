"""Writing a corpus, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from spear_megatron.data.corpus import LENGTH, Array, ContentHash
from spear_megatron.data.corpus_files import (
    COMPONENTS,
    DTYPES,
    FORMS,
    INFO_NAME,
    TABLE_NAME,
    TAR_INDEX_NAME,
    TAR_NAME,
    CorpusInfo,
    sample_file,
)
from spear_megatron.data.sft import SftExample
from spear_megatron.data.tar_index import write_index, write_tar
from spear_megatron.observability.files import named_errors, sync_path, write_atomically

Samples = Iterator[tuple[Array, Array]]


def write_corpus(
    folder: Path, examples: Iterable[SftExample], *, form: str, source: str, vocabulary_sha256: str
) -> CorpusInfo:
    """Write examples into a new folder, in the order given; it appears when it is complete.

    Args:
        form: packed, numpy or webdataset.
        source: where the examples are from, as ``corpus.json`` will tell.
        vocabulary_sha256: of the tokenizer that made the ids.

    Raises:
        ValueError: the folder exists, there are no examples, or one cannot be trained on (names its number).
    """
    if form not in FORMS:
        raise ValueError(f"a corpus is of the form {', '.join(FORMS)}, not {form!r}")
    if folder.exists():
        raise ValueError(f"{folder} exists: name a new folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        with named_errors(folder):
            info = _write(staging, examples, form, source, vocabulary_sha256)
        os.rename(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_path(folder.parent)
    return info


def _write(
    folder: Path, examples: Iterable[SftExample], form: str, source: str, vocabulary_sha256: str
) -> CorpusInfo:
    content = ContentHash()
    samples = (content.add(example, f"{source}: sample {i}") for i, example in enumerate(examples))
    _WRITERS[form](folder, samples)
    table = content.table()
    if not len(table):
        raise ValueError(f"{source} holds no samples to write")
    buffer = io.BytesIO()
    np.save(buffer, table)
    write_atomically(folder / TABLE_NAME, buffer.getvalue())
    info = CorpusInfo(
        form=form,
        source=source,
        num_samples=len(table),
        num_tokens=int(table[:, LENGTH].sum()),
        longest=int(table[:, LENGTH].max()),
        content_sha256=content.hexdigest(),
        table_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        vocabulary_sha256=vocabulary_sha256,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    )
    for name in info.files:
        sync_path(folder / name)
    write_atomically(folder / INFO_NAME, info.encode())
    return info


def _write_packed(folder: Path, samples: Samples) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builders = [
        IndexedDatasetBuilder(str(folder / f"{component}.bin"), dtype=dtype)
        for component, dtype in zip(COMPONENTS, DTYPES, strict=True)
    ]
    for sample in samples:
        for builder, part in zip(builders, sample, strict=True):
            builder.add_item(torch.from_numpy(part))
            builder.end_document()
    for component, builder in zip(COMPONENTS, builders, strict=True):
        builder.finalize(str(folder / f"{component}.idx"))


def _write_numpy(folder: Path, samples: Samples) -> None:
    for index, sample in enumerate(samples):
        for component, part in zip(COMPONENTS, sample, strict=True):
            path = sample_file(folder, index, component)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, part)


def _write_webdataset(folder: Path, samples: Samples) -> None:
    contents = (dict(zip(COMPONENTS, (part.tobytes() for part in sample), strict=True)) for sample in samples)
    write_index(folder / TAR_INDEX_NAME, write_tar(folder / TAR_NAME, contents))


_WRITERS: dict[str, Callable[[Path, Samples], None]] = {
    "packed": _write_packed, "numpy": _write_numpy, "webdataset": _write_webdataset,
}  # fmt: skip
