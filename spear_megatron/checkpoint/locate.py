"""Finds the checkpoint a user means: a step folder, a folder of checkpoints, or a run directory."""

from __future__ import annotations

import logging
from pathlib import Path

from spear_megatron.checkpoint.errors import DamagedCheckpoint
from spear_megatron.checkpoint.manifest import MANIFEST_NAME, Manifest, check_files, check_states, read_manifest
from spear_megatron.checkpoint.store import CheckpointStore

logger = logging.getLogger(__name__)

RUN_FOLDER = "checkpoints"


def find_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint at ``path``, or the newest good one below it. Every file is verified.

    Raises:
        ValueError: there is none, or none is intact; names what is wrong with each.
    """
    if (path / MANIFEST_NAME).exists():
        folders = [path]
    else:
        roots = [root for root in (path, path / RUN_FOLDER) if root.is_dir()]
        stores = [CheckpointStore(root) for root in roots]
        folders = [store.path(step) for store in stores for step in reversed(store.steps())]
    refusals = []
    for folder in folders:
        problems, manifest = _inspect(folder)
        if manifest is not None and not problems:
            return folder, manifest
        refusals.append(f"{folder.name}: {'; '.join(problems)}")
        logger.warning("checkpoint refused. %s", refusals[-1])
    if refusals:
        raise ValueError(f"no usable checkpoint at {path} ({' | '.join(refusals)}); restore one")
    raise ValueError(f"{path} holds no checkpoint: give a step folder, a folder of checkpoints, or a run directory")


def _inspect(folder: Path) -> tuple[list[str], Manifest | None]:
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpoint as error:
        return [str(error)], None
    return check_states(manifest, ("model",)) + check_files(folder, manifest), manifest
