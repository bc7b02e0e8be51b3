"""Finds the checkpoint a user means: a step folder, a folder of checkpoints, or a run directory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from spear_megatron.checkpoint.errors import DamagedCheckpoint
from spear_megatron.checkpoint.manifest import MANIFEST_NAME, Manifest, check_files, check_states, read_manifest
from spear_megatron.checkpoint.store import CheckpointStore

logger = logging.getLogger(__name__)

RUN_FOLDER = "checkpoints"
CheckFiles = Callable[[Path, Manifest], list[str]]


def find_checkpoint(path: Path, check: CheckFiles = check_files) -> tuple[Path, Manifest]:
    """The checkpoint at ``path``, or the newest good one below it. Every file is verified.

    Args:
        check: tells what is wrong with the files of a checkpoint; ranks that share the work bring their own.

    Raises:
        ValueError: there is none, or none is intact; names what is wrong with each.
    """
    refusals: list[str] = []
    for folder in checkpoint_folders(path):
        problems, manifest = _inspect(folder, check)
        if manifest is not None and not problems:
            for refusal in refusals:
                logger.warning("checkpoint refused. %s", refusal)
            return folder, manifest
        refusals.append(f"{folder.name}: {'; '.join(problems)}")
    if refusals:
        raise ValueError(f"no usable checkpoint at {path} ({' | '.join(refusals)}); restore one")
    raise ValueError(f"{path} holds no checkpoint: give a step folder, a folder of checkpoints, or a run directory")


def checkpoint_folders(path: Path) -> list[Path]:
    """``path`` itself if it is a checkpoint, else those below it, newest first; nothing is verified."""
    if (path / MANIFEST_NAME).exists():
        return [path]
    stores = [CheckpointStore(root) for root in (path, path / RUN_FOLDER) if root.is_dir()]
    return [store.path(step) for store in stores for step in reversed(store.steps())]


def _inspect(folder: Path, check: CheckFiles) -> tuple[list[str], Manifest | None]:
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpoint as error:
        return [str(error)], None
    return check_states(manifest, ("model",)) + check(folder, manifest), manifest
