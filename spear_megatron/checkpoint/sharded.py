"""Model and optimizer through megatron-core's dist_checkpointing format, written in process.

megatron-core's own writer starts worker processes, which costs seconds for a small model and forks a process that has
threads. Here every rank writes its one file itself, from the main thread or from a background one; collectives
happen only while planning and completing, on the main thread. megatron-core reads the result with its own ``load``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from spear_megatron.checkpoint.errors import CheckpointError
from spear_megatron.data.files import FileEntry, FileSystem, hash_file
from spear_megatron.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.model.global_map import SEPARATE_NORMS
from spear_megatron.model.weight_map import unwrap
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState

FOLDER = "sharded"
COMMON_NAME = "common.pt"
_COMPLETED_BY_RANK_0 = (".metadata", "metadata.json")


@dataclass(frozen=True)
class ShardPlan:
    """What one rank has to write: its items with their data, and on rank 0 the metadata and the unsharded rest."""

    file_name: str
    items: list[tuple[WriteItem, torch.Tensor | io.BytesIO]]
    num_bytes: int
    metadata: Metadata | None
    common: bytes | None

    def write(self, files: FileSystem, folder: Path) -> tuple[list[WriteResult], list[FileEntry]]:
        """Write this rank's files into ``folder``. No collective: may run in a background thread.

        Raises:
            OSError: the disk is full or failed.
        """
        results: list[WriteResult] = []
        entries: list[FileEntry] = []
        if self.items:
            with files.create(folder / self.file_name) as stream:
                for item, data in self.items:
                    start = stream.tell()
                    if isinstance(data, io.BytesIO):
                        stream.write(data.getbuffer())
                    else:
                        torch.save(data.cpu(), stream)
                    size = stream.tell() - start
                    results.append(WriteResult(item.index, size, _StorageInfo(self.file_name, start, size)))
            entries.append(stream.entry(f"{FOLDER}/{self.file_name}"))
        if self.common is not None:
            entries.append(files.write(folder / COMMON_NAME, self.common, f"{FOLDER}/{COMMON_NAME}"))
        return results, entries


def sharded_model_state(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state dict of all model chunks, keyed ``model`` or, with several, ``model0``, ``model1``, ..."""
    modules = [unwrap(chunk) for chunk in model_chunks]
    if len(modules) == 1:
        return {"model": modules[0].sharded_state_dict()}
    return {f"model{index}": module.sharded_state_dict() for index, module in enumerate(modules)}


def plan_save(
    parallel: ParallelState, model_chunks: Sequence[torch.nn.Module], optimizer: Any | None, *, snapshot: bool
) -> ShardPlan:
    """Decide what this rank writes. Collective.

    Args:
        optimizer: a Megatron optimizer, or None to save the model alone.
        snapshot: copy every tensor to the host now, so that training may go on while the plan is written.
    """
    with megatron_on_cpu():
        state = sharded_model_state(model_chunks)
        if optimizer is not None:
            state["optimizer"] = sharded_optimizer_state(optimizer, dict(state), is_loading=False)
        sharded, common = save_preprocess(state, True, _comparable)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        tensors = mcore_to_pyt_state_dict(by_key, False)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(tensors, is_coordinator=parallel.rank == 0)
    local = planner.create_local_plan()
    plans = gather_objects(parallel, local)
    metadata = planner.create_global_plan(plans)[1] if parallel.rank == 0 else None
    local = planner.finish_plan(planner.create_decentralized_global_plan(local))
    items = [(item, _own_data(item, planner.resolve_data(item), snapshot)) for item in local.items]
    common_bytes = _serialise(common) if parallel.rank == 0 else None
    num_bytes = sum(_size(data) for _, data in items) + len(common_bytes or b"")
    return ShardPlan(f"__{parallel.rank}_0.distcp", items, num_bytes, metadata, common_bytes)


def complete_save(folder: Path, metadata: Metadata, results: list[list[WriteResult]]) -> list[FileEntry]:
    """Rank 0: write the index files from every rank's results; returns their entries."""
    writer = FileSystemWriter(str(folder), single_file_per_rank=True, sync_files=True)
    writer.finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    entries = []
    for name in _COMPLETED_BY_RANK_0:
        path = folder / name
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        entries.append(FileEntry(f"{FOLDER}/{name}", path.stat().st_size, hash_file(path)))
    return entries


def load_sharded(
    parallel: ParallelState, folder: Path, model_chunks: Sequence[torch.nn.Module], optimizer: Any | None
) -> None:
    """Load model and (unless None) optimizer from a distributed checkpoint folder of any layout. Collective.

    Raises:
        CheckpointError: the checkpoint lacks tensors of this model, has others, or of another shape.
    """
    with megatron_on_cpu():
        loaded, problem = _read(folder, model_chunks, optimizer)
        problems = [text for text in gather_objects(parallel, problem) if text]
        if problems:
            raise CheckpointError(f"{folder} does not fit this model: {problems[0]}; check the model's path and config")
        with torch.no_grad():
            for name, chunk in zip(_model_names(model_chunks), model_chunks, strict=True):
                unwrap(chunk).load_state_dict(loaded[name])
            if optimizer is not None:
                load_optimizer_state(optimizer, loaded["optimizer"])


def _read(
    folder: Path, model_chunks: Sequence[torch.nn.Module], optimizer: Any | None
) -> tuple[dict[str, Any], str | None]:
    state = sharded_model_state(model_chunks)
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer_state(optimizer, dict(state), is_loading=True)
    try:
        _use_stored_norm_names(state, folder)
        loaded, unused, absent = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    except (CheckpointingException, KeyError, ValueError) as error:
        return {}, str(error)
    except CheckpointException as error:  # a BaseException that carries the failures of all ranks
        return {}, "; ".join(str(failure) for failure, _ in error.failures.values())
    return loaded, _mismatch(unused, absent, with_optimizer=optimizer is not None)


def _use_stored_norm_names(state: dict[str, Any], folder: Path) -> None:
    """Ask for the norms of a layer under the keys of the checkpoint, where they are modules of their own."""
    stored = set(dist_checkpointing.load_tensors_metadata(str(folder)))
    for tensor in nested_values(state):
        for fused, separate in SEPARATE_NORMS.items():
            key = getattr(tensor, "key", "")
            if key.endswith(fused) and key not in stored and key.removesuffix(fused) + separate in stored:
                tensor.key = key.removesuffix(fused) + separate


def _model_names(model_chunks: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(model_chunks) == 1 else [f"model{index}" for index in range(len(model_chunks))]


def _mismatch(unused: set[str], absent: set[str], *, with_optimizer: bool) -> str | None:
    # Extra states belong to Transformer Engine modules; a checkpoint of the plain layer spec has none.
    absent = {key for key in absent if not key.endswith("_extra_state") and "_extra_state/" not in key}
    unused = {key for key in unused if "_extra_state" not in key}
    if not with_optimizer:
        unused = {key for key in unused if not key.startswith("optimizer.")}
    if absent:
        return f"it lacks {_some(absent)}"
    if unused:
        return f"it also holds {_some(unused)}"
    return None


def _some(keys: set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _comparable(common: dict[str, Any]) -> dict[str, Any]:
    """The part of the unsharded rest that must agree on all ranks: parameter groups differ by pipeline stage."""
    return {key: value for key, value in common.items() if key != "optimizer"}


def _own_data(item: WriteItem, data: Any, snapshot: bool) -> torch.Tensor | io.BytesIO:
    if item.type == WriteItemType.BYTE_IO:
        return data
    tensor = data.detach()
    if snapshot:
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    # torch.save writes the whole storage behind a view.
    is_view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
    return tensor.clone() if is_view and tensor.device.type == "cpu" else tensor


def _serialise(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _size(data: torch.Tensor | io.BytesIO) -> int:
    return data.getbuffer().nbytes if isinstance(data, io.BytesIO) else data.numel() * data.itemsize
