"""Checkpoint folders on disk: staged, completed by one rename, kept, thrown away. Knows nothing of models or ranks.

A step becomes a checkpoint by the rename of its complete staging folder, and stops being one by a rename to a trash
folder. Whatever moment a kill chooses, a folder named ``step_*`` is whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path

from spear_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from spear_megatron.data.files import FileSystem
from spear_megatron.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_external,
    check_files,
    check_states,
    read_manifest,
)

logger = logging.getLogger(__name__)

STAGING_PREFIX = ".staging-"
TRASH_PREFIX = ".trash-"
_STEP = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Folder name of a step, such as ``step_00000012``."""
    return f"step_{step:08d}"


class CheckpointStore:
    """The folder ``root`` with one sub-folder per checkpoint. Used by one process at a time (rank 0)."""

    def __init__(self, root: Path, files: FileSystem | None = None) -> None:
        self.root = root
        self.files = files or FileSystem()

    def path(self, step: int) -> Path:
        """Folder of a complete checkpoint."""
        return self.root / step_name(step)

    def staging_path(self, step: int) -> Path:
        """Folder in which a checkpoint is put together."""
        return self.root / f"{STAGING_PREFIX}{step_name(step)}"

    def steps(self) -> list[int]:
        """Steps that have a completed folder, oldest first; their content is not checked."""
        if not self.root.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def problems(self, step: int, required: Collection[str] = (), part: int = 0, num_parts: int = 1) -> list[str]:
        """What makes a checkpoint unusable, one phrase each; empty for a good one.

        Args:
            required: states that must be there.
            part, num_parts: the share of the files whose bytes are compared, see ``check_files``.
        """
        folder = self.path(step)
        try:
            manifest = read_manifest(folder)
        except DamagedCheckpoint as error:
            return [str(error)]
        if manifest.step != step:
            return [f"{MANIFEST_NAME} belongs to step {manifest.step}"]
        found = check_states(manifest, required) + check_files(folder, manifest, part, num_parts)
        return found + check_external(self.root.parent, manifest, part, num_parts)

    def external_files(self) -> set[str]:
        """External files that completed checkpoints name, by path relative to the run directory.

        Raises:
            DamagedCheckpoint: a manifest cannot be read, so that nobody knows what it names.
        """
        return {entry.path for step in self.steps() for entry in read_manifest(self.path(step)).external}

    def clean(self) -> None:
        """Create ``root`` if needed; remove what an interrupted save or deletion left behind."""
        self.root.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.root.iterdir()):
            if path.name.startswith((STAGING_PREFIX, TRASH_PREFIX)):
                logger.info("removing %s, left by an interrupted run", path)
                self.files.remove_tree(path)

    def check_space(self, step: int, needed: int) -> None:
        """Refuse early when the disk cannot take ``needed`` more bytes.

        Raises:
            CheckpointError: names the folder, the bytes needed and the bytes free.
        """
        free = self.files.free_bytes(self.root)
        if free < needed:
            raise CheckpointError(
                f"no room for the checkpoint of step {step} in {self.root}: it needs {needed} bytes and {free} are "
                "free; free some space or keep fewer checkpoints (earlier checkpoints are untouched)"
            )

    def begin(self, step: int, folders: Collection[str] = ()) -> Path:
        """Fresh staging folder with the given sub-folders."""
        staging = self.staging_path(step)
        if staging.exists():
            self.files.remove_tree(staging)
        self.files.mkdir(staging)
        for name in folders:
            self.files.mkdir(staging / name)
        return staging

    def commit(self, step: int, manifest: Manifest) -> Path:
        """Complete a staged checkpoint: manifest last, then one rename. Replaces a damaged one of the same step."""
        staging = self.staging_path(step)
        self.files.write(staging / MANIFEST_NAME, manifest.encode(), MANIFEST_NAME)
        for folder in sorted({(staging / entry.path).parent for entry in manifest.files} | {staging}):
            self.files.sync_folder(folder)
        final = self.path(step)
        if final.exists():
            self.delete(step)
        self.files.rename(staging, final)
        return final

    def discard(self, step: int) -> None:
        """Throw a staged checkpoint away."""
        staging = self.staging_path(step)
        if staging.exists():
            self.files.remove_tree(staging)

    def delete(self, step: int) -> None:
        """Delete a completed checkpoint: first it loses its name, then its files."""
        trash = self.root / f"{TRASH_PREFIX}{step_name(step)}"
        if trash.exists():
            self.files.remove_tree(trash)
        self.files.rename(self.path(step), trash)
        self.files.remove_tree(trash)

    def keep_last(self, keep: int, refused: Collection[int] = ()) -> list[int]:
        """Delete all checkpoints older than the ``keep`` newest; ``refused`` (damaged) ones do not count as kept.

        Returns:
            The steps deleted.
        """
        steps = self.steps()
        good = [step for step in steps if step not in refused]
        if len(good) <= keep:
            return []
        oldest_kept = good[-keep]
        doomed = [step for step in steps if step < oldest_kept]
        for step in doomed:
            self.delete(step)
        return doomed
