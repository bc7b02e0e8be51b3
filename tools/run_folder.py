"""Folders of training runs as the tools see them: making one anew, what a run left in it, exact comparison."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

TIMING_PREFIXES = ("timing_s/", "perf/", "unix_time")
_OURS = ".made_by_tool"


def renew_folder(folder: Path) -> None:
    """Make ``folder``, empty; what an earlier call with this path left there goes.

    Raises:
        ValueError: it holds files of somebody else, or is none.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _OURS).is_file():
        raise ValueError(f"{folder} holds something else than results of this tool: name another folder, or remove it")
    if folder.is_dir():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} cannot be a folder, there is a file in its place: name another") from error
    (folder / _OURS).touch()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of a run without the keys that measure time."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short; the next start drops it
        records.append({key: value for key, value in record.items() if not key.startswith(TIMING_PREFIXES)})
    return records


def first_difference(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> str:
    """Where two records differ first, or an empty string. Values are compared as text: no tolerance."""
    for position, (one, other) in enumerate(zip(expected, actual, strict=False)):
        for key in sorted(one.keys() | other.keys()):
            values = (json.dumps(one.get(key, "absent")), json.dumps(other.get(key, "absent")))
            if values[0] != values[1]:
                return f"line {position + 1} (step {one.get('step')}), {key}: {values[0]} became {values[1]}"
    if len(expected) != len(actual):
        return f"{len(expected)} lines became {len(actual)}"
    return ""


def hash_folder(folder: Path) -> str:
    """SHA-256 over names and bytes of all files, e.g. of an exported model."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest completed checkpoint, 0 without any."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def is_saving(run_dir: Path) -> bool:
    """Whether a checkpoint is being written or an old one deleted, or was when the last attempt was killed."""
    return bool(unfinished(run_dir))


def unfinished(run_dir: Path) -> set[tuple[str, int]]:
    """(name, inode) of every checkpoint folder that is not complete, leftovers of an earlier kill included."""
    found = set()
    for pattern in (".staging-*", ".trash-*"):
        for path in (run_dir / "checkpoints").glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # it was completed in between
                found.add((path.name, path.stat().st_ino))
    return found
