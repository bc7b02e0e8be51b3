"""Rows of data sets as they are published: parquet, JSON lines or JSON, on this machine or on the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear_megatron.data.jsonl import read_jsonl

FORMATS = (".parquet", ".jsonl", ".json")
"""Endings of data files, in order of preference where a folder holds several."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: ``name`` as given, ``revision`` the commit on the hub (None for local files)."""

    name: str
    revision: str | None
    files: tuple[Path, ...]


def find_source(name: str, revision: str | None = None) -> Source:
    """The data files that ``name`` stands for: a file, a folder of files, or the id of a data set on the hub.

    In a folder the files of the best format of ``FORMATS`` are taken, and of these those named after a training split
    if there are any.

    Args:
        revision: branch, tag or commit of a data set on the hub; None takes the newest.

    Raises:
        ValueError: nothing is there, it has no data files, ``revision`` is given for local files, or the data set
            cannot be fetched, as when huggingface_hub is not installed.
    """
    if not name:
        raise ValueError("--source is empty: name a file, a folder, or a data set of the hub as owner/name")
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise ValueError(f"--revision={revision} belongs to data sets on the hub, but {name} is on this machine")
        return Source(name, None, (path,) if path.is_file() else _data_files(path))
    if path.suffix in FORMATS or _HUB_ID.fullmatch(name) is None:
        raise ValueError(f"{name} does not exist: name a file, a folder, or a data set of the hub as owner/name")
    folder = _fetch(name, revision)
    return Source(name, folder.name, _data_files(folder))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: row N", row) for every row of a data file, the first one is row 1.

    Raises:
        ValueError: the ending is not one of ``FORMATS``, the content is not what it says, or pyarrow is not installed.
    """
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix == ".json":
        yield from _read_json(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}: data files end in {', '.join(FORMATS)}")


def _data_files(folder: Path) -> tuple[Path, ...]:
    for ending in FORMATS:
        found = sorted(path for path in folder.rglob(f"*{ending}") if path.is_file())
        if found:
            return tuple(path for path in found if "train" in path.name) or tuple(found)
    raise ValueError(f"{folder} holds no data files: their names end in {', '.join(FORMATS)}")


def _fetch(name: str, revision: str | None) -> Path:
    """Folder of a data set's files; its name is the commit."""
    hub = _optional("huggingface_hub", f"{name} is no file here, and fetching it from the hub")
    patterns = [f"*{ending}" for ending in FORMATS]
    try:
        return Path(hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot fetch the data set {name} from the hub: {reason}") from error


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(rows, ensure_ascii=False).encode()
    except OSError as error:
        raise ValueError(f"cannot read the data file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of rows, not {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} must be an object, not {type(row).__name__}")
        yield f"{path}: row {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    pyarrow = _optional("pyarrow", f"reading {path}")
    parquet = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _optional(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{purpose} needs {module}, which is not installed: install it, or give the rows as a .jsonl file"
        ) from error
