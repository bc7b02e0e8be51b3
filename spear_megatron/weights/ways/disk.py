"""Weights as a Hugging Face folder that every leader and every server can read: one file per bucket."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from spear_megatron.model.hf_export import copy_companions, write_config
from spear_megatron.model.hf_folder import INDEX_NAME
from spear_megatron.observability.files import sync_path
from spear_megatron.weights.memory import host_bytes
from spear_megatron.weights.plan import Bucket, SyncPlan
from spear_megatron.weights.servers import ServerGroup, Target

_VERSION = re.compile(r"version_(\d+)")


class DiskWay:
    """``update_weights_from_disk``. The folder of a version appears whole or not at all; old ones are removed.

    Args:
        root: folder of the versions.
        source: model folder whose config.json and tokenizer files go with the weights.
        keep: newest versions that stay.
    """

    needs_session = False

    def __init__(self, group: ServerGroup, plan: SyncPlan, root: Path, source: Path, keep: int) -> None:
        self._group = group
        self._plan = plan
        self._root = root
        self._source = source
        self._keep = keep
        self._targets: list[str] = []
        self._version = 0

    @property
    def folder(self) -> Path:
        """Where the weights of the newest version are, or will be."""
        return self._root / f"version_{self._version:08d}"

    @property
    def published_folder(self) -> str | None:
        """Absolute path of the newest complete version."""
        return str(self.folder.resolve()) if self.folder.is_dir() else None

    @property
    def _partial(self) -> Path:
        return self._root / f".{self.folder.name}.partial"

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Host memory for a bucket, uint8 [num_bytes]."""
        return host_bytes(num_bytes)

    def begin(self, targets: Sequence[Target], version: int) -> None:
        """Make the folder that all leaders write to."""
        self._targets = [target.url for target in targets]
        self._version = version
        self._partial.mkdir(parents=True, exist_ok=True)

    def send(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Write one bucket's file."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        flat = flat.cpu()
        tensors = {entry.name: entry.view(flat, self._plan.dtype) for entry in bucket.entries}
        path = self._partial / self._file(bucket)
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, for one
            raise OSError(f"{path} could not be written: {error}") from error
        sync_path(path)

    def send_closing(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Complete the folder, put it in place, and let every server load it."""
        self.send(bucket, flat)
        self._write_rest()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._partial.rename(self.folder)
        sync_path(self._root)
        folder, label = str(self.folder.resolve()), str(self._version)
        self._group.each(self._targets, lambda client: client.update_from_disk(folder, label, flush=False))
        self._prune()

    def abandon(self) -> None:
        """No server waits for anything; files of an unfinished version are overwritten by the next attempt."""

    def close(self) -> None:
        """The folders stay."""

    def _file(self, bucket: Bucket) -> str:
        return f"model-{bucket.index + 1:05d}-of-{len(self._plan.buckets):05d}.safetensors"

    def _write_rest(self) -> None:
        files = {entry.name: self._file(bucket) for bucket in self._plan.buckets for entry in bucket.entries}
        missing = sorted({file for file in files.values() if not (self._partial / file).is_file()})
        if missing:
            raise OSError(
                f"{self._partial / missing[0]} is missing: actor_rollout_ref.rollout.sglang.weights.folder must be one "
                "folder that all data-parallel leaders share"
            )
        index = {"metadata": {"total_size": self._plan.num_bytes}, "weight_map": files}
        write_config(self._source, self._partial, self._plan.dtype)
        copy_companions(self._source, self._partial)
        (self._partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in [*self._partial.rglob("*"), self._partial]:
            sync_path(file)

    def _prune(self) -> None:
        """Remove all but the newest versions up to this one, later ones of a course that a resumed run left, and what
        cut-off updates left."""
        versions = sorted(path for path in self._root.iterdir() if _VERSION.fullmatch(path.name))
        known = [path for path in versions if path.name <= self.folder.name]
        abandoned = [path for path in versions if path.name > self.folder.name]
        unfinished = self._root.glob(".version_*.partial")
        for path in [*known[: -self._keep], *abandoned, *unfinished]:
            shutil.rmtree(path, ignore_errors=True)
