"""From a published data set to the files that training reads, with a manifest of what was kept and what was not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spear_megatron.data.files import hash_file
from spear_megatron.data.published import Convert, Converted, Unusable, convert_retool, problem_converter
from spear_megatron.data.sources import Source, find_source, read_rows
from spear_megatron.observability.files import write_atomically
from spear_megatron.parallel.paths import check_output_folder

DATASETS: Mapping[str, Convert] = {
    "dapo-math-17k": problem_converter("dapo-math-17k", aime=False),
    "aime-2024": problem_converter("aime-2024", aime=True),
    "aime-2025": problem_converter("aime-2025", aime=True),
    "retool-sft": convert_retool,
}
"""Data sets by the name of the file that they become."""
DUPLICATE, CONFLICT = "duplicate", "copies with another answer"
_MAX_UNUSABLE = 0.5
_NUM_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file by name, size in bytes and SHA-256 of its content."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What became of a data set, written beside the data as JSON; equal inputs give an equal manifest.

    Attributes:
        source, revision: as given, and the commit on the hub (None for local files).
        source_files, output: the files that were read, and the one that was written.
        rows_read, rows_written: ``rows_read`` is ``rows_written`` and all of ``dropped`` together.
        dropped: rows left out, by reason.
        examples: where the first of them stand, by reason.
    """

    dataset: str
    source: str
    revision: str | None
    source_files: tuple[FileDigest, ...]
    output: FileDigest
    rows_read: int
    rows_written: int
    dropped: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]


@dataclass(slots=True)
class _Copies:
    """Equal rows: the first one, how many there are, where the second stands and where one contradicts the first."""

    first: Converted
    count: int = 0
    second: str | None = None
    contradiction: str | None = None


@dataclass(slots=True)
class _Tally:
    """Rows by what became of them."""

    groups: dict[str, _Copies] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0

    def drop(self, reason: str, where: str, count: int = 1) -> None:
        """Count rows that are left out."""
        self.dropped[reason] += count
        places = self.examples.setdefault(reason, [])
        if len(places) < _NUM_EXAMPLES:
            places.append(where)

    def keep(self, item: Converted, where: str) -> None:
        """Add a row to its copies."""
        group = self.groups.setdefault(item.key, _Copies(item))
        group.count += 1
        if group.count > 1 and group.second is None:
            group.second = where
        if item.content != group.first.content and group.contradiction is None:
            group.contradiction = where

    def written(self) -> list[Mapping[str, Any]]:
        """The first of all copies that agree, in order; the others are counted as dropped."""
        rows = []
        for group in self.groups.values():
            if group.contradiction is not None:
                self.drop(CONFLICT, group.contradiction, group.count)
                continue
            if group.second is not None:
                self.drop(DUPLICATE, group.second, group.count - 1)
            rows.append(group.first.row)
        return rows


def prepare_dataset(dataset: str, source: str, out: Path, *, revision: str | None = None) -> Manifest:
    """Write ``out/<dataset>.jsonl`` and ``out/<dataset>.manifest.json``, each of them whole or not at all.

    Copies of a row are written once, where the first of them stood. A problem whose copies have different answers is
    left out. The data is written before the manifest, which holds its hash.

    Args:
        dataset: a name of :data:`DATASETS`.
        source: a data file, a folder of data files, or ``owner/name`` on the Hugging Face hub.
        revision: branch, tag or commit there.

    Raises:
        ValueError: an unknown data set, a source that cannot be read or is another data set (names file, row and key),
            or nothing of use in it.
    """
    if dataset not in DATASETS:
        raise ValueError(f"--dataset={dataset} is not known: use one of {', '.join(DATASETS)}")
    check_output_folder(out, "--out")
    found = find_source(source, revision)
    tally = _collect(dataset, found)
    rows = tally.written()
    _check_share(dataset, tally, len(rows))
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path = out / f"{dataset}.jsonl"
    manifest = Manifest(
        dataset=dataset,
        source=found.name,
        revision=found.revision,
        source_files=tuple(FileDigest(file.name, file.stat().st_size, hash_file(file)) for file in found.files),
        output=FileDigest(path.name, len(data), hashlib.sha256(data).hexdigest()),
        rows_read=tally.rows,
        rows_written=len(rows),
        dropped=dict(sorted(tally.dropped.items())),
        examples={reason: tuple(places) for reason, places in sorted(tally.examples.items())},
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n"
    write_atomically(out / f"{dataset}.manifest.json", text.encode())
    return manifest


def _collect(dataset: str, source: Source) -> _Tally:
    convert, tally = DATASETS[dataset], _Tally()
    for path in source.files:
        for where, row in read_rows(path):
            tally.rows += 1
            try:
                tally.keep(convert(row, where), where)
            except Unusable as reason:
                tally.drop(str(reason), where)
    return tally


def _check_share(dataset: str, tally: _Tally, written: int) -> None:
    """Refuse a source of which little is of use: it is most likely another data set."""
    if not tally.rows:
        raise ValueError("the source has no rows")
    unusable = {reason: count for reason, count in tally.dropped.items() if reason != DUPLICATE}
    if not written or sum(unusable.values()) > _MAX_UNUSABLE * tally.rows:
        reason, count = max(unusable.items(), key=lambda item: item[1])
        raise ValueError(
            f"of {tally.rows} rows only {written} are of use as {dataset}, {count} were left out for {reason!r}, such "
            f"as {tally.examples[reason][0]}: check that --source is this data set"
        )
