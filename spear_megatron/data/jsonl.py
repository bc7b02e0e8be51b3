"""Reading JSON lines with errors that name the file and the line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PARQUET = b"PAR1"


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) for every line that is not blank.

    Raises:
        ValueError: the file is missing, not UTF-8, or a line is not a JSON object.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        remedy = "check the path and its permissions, and name a file of JSON lines"
        raise ValueError(f"cannot read the data file {path}: {error.strerror}; {remedy}") from error
    if content.startswith(_PARQUET):
        raise ValueError(f"{path} is a parquet file: the command 'prepare' turns published data sets into JSON lines")
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(), parse_constant=_no_constant)
            json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: the line is not valid JSON in UTF-8: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: the line must be a JSON object, not {type(row).__name__}")
        yield where, row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
