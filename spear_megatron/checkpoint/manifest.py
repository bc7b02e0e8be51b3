"""The manifest of one checkpoint: every state, every file with size and checksum, and the layout that wrote it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear_megatron.checkpoint.errors import DamagedCheckpoint
from spear_megatron.data.files import FileEntry, hash_file

FORMAT = "spear_megatron checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"

SHARDED = "sharded"
JSON = "json"
TENSORS = "tensors"


@dataclass(frozen=True, slots=True)
class StateEntry:
    """Where a state lives: ``kind`` is sharded (in the distributed part), json or tensors (one file of its own)."""

    kind: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        step: training steps done.
        fingerprint: names the configuration that wrote it.
        layout: world size and parallel sizes at the time of writing (a checkpoint loads at any layout).
        software: versions of the libraries that wrote it.
        states: every state by name.
        files: every file except the manifest itself.
        external: files of the run directory outside of checkpoints, by path relative to it: the number of their first
            bytes that belong to this checkpoint, and the SHA-256 of those. Whatever follows is of later steps.
    """

    step: int
    fingerprint: str
    layout: Mapping[str, int]
    software: Mapping[str, str]
    states: Mapping[str, StateEntry]
    files: tuple[FileEntry, ...]
    external: tuple[FileEntry, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.num_bytes for entry in self.files)

    def encode(self) -> bytes:
        """JSON text that carries the checksum of its own content."""
        body: dict[str, Any] = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        body["checksum"] = _checksum(body)
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` of a checkpoint folder.

    Raises:
        DamagedCheckpoint: it is missing, unreadable, of an unknown version, or its content was altered.
    """
    path = folder / MANIFEST_NAME
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{MANIFEST_NAME} is missing: the checkpoint was not completed") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{MANIFEST_NAME} cannot be read: {error}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{MANIFEST_NAME} is not a manifest of this program")
    if body.get("version") != VERSION:
        raise DamagedCheckpoint(
            f"{MANIFEST_NAME} has version {body.get('version')!r}, this program reads version {VERSION}"
        )
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise DamagedCheckpoint(f"{MANIFEST_NAME} does not match its own checksum")
    return Manifest(
        step=body["step"],
        fingerprint=body["fingerprint"],
        layout=body["layout"],
        software=body["software"],
        states={name: StateEntry(**entry) for name, entry in body["states"].items()},
        files=tuple(FileEntry(**entry) for entry in body["files"]),
        external=tuple(FileEntry(**entry) for entry in body.get("external", ())),
    )


def check_states(manifest: Manifest, required: Collection[str]) -> list[str]:
    """Problems with the set of states: required ones that are absent, or states whose file is not listed."""
    problems = [f"state '{name}' is missing" for name in sorted(set(required) - set(manifest.states))]
    listed = {entry.path for entry in manifest.files}
    for name, state in sorted(manifest.states.items()):
        if state.kind not in (SHARDED, JSON, TENSORS):
            problems.append(f"state '{name}' is of unknown kind {state.kind!r}")
        elif state.kind != SHARDED and state.path not in listed:
            problems.append(f"state '{name}' has no file")
    return problems


def check_files(folder: Path, manifest: Manifest, part: int = 0, num_parts: int = 1) -> list[str]:
    """Files that are missing, of another size, or of another checksum.

    Looks at every ``num_parts``-th file from ``part``, largest first, so that ranks can share the reading.
    """
    problems = []
    for entry in sorted(manifest.files, key=lambda entry: (-entry.num_bytes, entry.path))[part::num_parts]:
        path = folder / entry.path
        try:
            size = path.stat().st_size
            if size != entry.num_bytes:
                problems.append(f"file {entry.path} has {size} bytes instead of {entry.num_bytes}")
            elif hash_file(path) != entry.sha256:
                problems.append(f"file {entry.path} is damaged: its checksum differs")
        except FileNotFoundError:
            problems.append(f"file {entry.path} is missing")
        except OSError as error:
            problems.append(f"file {entry.path} cannot be read: {error}")
    return problems


def check_external(run_dir: Path, manifest: Manifest, part: int = 0, num_parts: int = 1) -> list[str]:
    """External files that are missing, too short, or whose first bytes have another checksum; shared as above."""
    problems = []
    for entry in sorted(manifest.external, key=lambda entry: (-entry.num_bytes, entry.path))[part::num_parts]:
        path = run_dir / entry.path
        try:
            size = path.stat().st_size
            if size < entry.num_bytes:
                problems.append(f"file {entry.path} has {size} bytes, fewer than the {entry.num_bytes} named")
            elif hash_file(path, entry.num_bytes) != entry.sha256:
                problems.append(f"file {entry.path} is damaged: the checksum of its {entry.num_bytes} bytes differs")
        except FileNotFoundError:
            problems.append(f"file {entry.path} is missing")
        except OSError as error:
            problems.append(f"file {entry.path} cannot be read: {error}")
    return problems


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
