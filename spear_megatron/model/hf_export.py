"""Writes the model as a Hugging Face folder that plain transformers loads: streamed, and whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spear_megatron.model.hf_folder import INDEX_NAME, SINGLE_NAME
from spear_megatron.model.hf_io import iter_hf_tensors
from spear_megatron.model.shape import ModelShape
from spear_megatron.observability.files import sync_path
from spear_megatron.parallel.agreement import forget_heartbeat, gather_objects, heartbeat, wait_for_leaders
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import ParallelState

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

MAX_SHARD_BYTES = 5 * 10**9
TIMEOUT_S = 6 * 3600.0
"""Deadline of one export."""
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_COMPANION_FOLDERS = ("additional_chat_templates",)


def export_hf(
    model_chunks: Sequence[MegatronModule],
    shape: ModelShape,
    parallel: ParallelState,
    out_dir: str | Path,
    source_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``out_dir``: weights, config.json and the tokenizer files of ``source_folder``. Collective.

    Tensors are streamed into shards of at most ``max_shard_bytes`` (one larger tensor makes a shard of its own); the
    writer, global rank 0, holds one shard and one tensor. Everything goes into a folder beside ``out_dir``, which
    takes its place at the end: a crash leaves the old one. ``dtype`` None keeps the model's.

    Raises:
        RunError: on every rank alike, when the writer failed (disk full, no permission); says why.
        RunTimeout: the writer was not heard of, or took longer than ``TIMEOUT_S``.
    """
    problem, phase = None, f"export to {out_dir}"
    if parallel.dp_rank == 0:
        tensors = iter_hf_tensors(model_chunks, shape, parallel, dtype=dtype)
        if parallel.rank == 0:
            kept = dtype or next(iter(model_chunks[0].parameters())).dtype
            with heartbeat(parallel, phase):
                problem = _write(tensors, shape, Path(out_dir), Path(source_folder), kept, max_shard_bytes)
        for _ in tensors:  # ranks that only send; the writer, too, must finish after a failure or the others hang
            pass
    if parallel.rank != 0:  # writing a large model takes longer than a collective may
        wait_for_leaders(parallel, phase, [0], TIMEOUT_S)
    problem = gather_objects(parallel, problem)[0]
    forget_heartbeat(parallel, phase)
    if problem is not None:
        raise RunError(f"exporting the model to {out_dir} failed: {problem}")


def plan_shards(shape: ModelShape, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names of every shard, in the order of ``shape.parameter_shapes()``."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor_shape in shape.parameter_shapes().items():
        size = prod(tensor_shape) * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def shard_name(number: int, count: int) -> str:
    """Name of the ``number``-th (from 1) of ``count`` safetensors files."""
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(out: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of several safetensors files: tensor name -> file name."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(source_folder: str | Path, out_dir: str | Path) -> None:
    """Copy tokenizer, chat template and generation config, those that exist, unchanged."""
    source, out = Path(source_folder), Path(out_dir)
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    for name in _COMPANION_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name, dirs_exist_ok=True)


def _write(
    tensors: Iterator[tuple[str, torch.Tensor | None]],
    shape: ModelShape,
    out_dir: Path,
    source: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> str | None:
    """Write the folder and put it in place; returns what went wrong instead of raising, for all ranks to raise."""
    from safetensors import SafetensorError

    # Fixed names: what a killed export left is found, and cannot stand in the way of this one.
    partial, old = (out_dir.with_name(f".{out_dir.name}.{suffix}") for suffix in ("partial", "old"))
    try:
        if old.exists() and not out_dir.exists():
            old.rename(out_dir)
        for leftover in (partial, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        write_config(source, partial, dtype)
        copy_companions(source, partial)
        _write_shards(tensors, plan_shards(shape, dtype, max_shard_bytes), partial)
        _put_in_place(partial, out_dir, old)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: the source's config.json is not JSON
        shutil.rmtree(partial, ignore_errors=True)
        return str(error)
    return None


def write_config(source: Path, out: Path, dtype: torch.dtype) -> None:
    """config.json unchanged, but for the declared dtype where it is not that of the weights."""
    text = (source / "config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    declared = {key: config[key] for key in ("dtype", "torch_dtype") if key in config} or {"dtype": None}
    name = str(dtype).removeprefix("torch.")
    if set(declared.values()) != {name}:
        text = json.dumps(config | dict.fromkeys(declared, name), indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor | None]], shards: list[list[str]], out: Path) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, names in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        buffer: dict[str, torch.Tensor] = {}
        for expected in names:
            name, tensor = next(tensors)
            assert name == expected and tensor is not None, f"got {name} in place of {expected}"
            buffer[name] = tensor
            total_bytes += tensor.nbytes
        save_file(buffer, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        write_index(out, weight_map, total_bytes)


def _put_in_place(partial: Path, out_dir: Path, old: Path) -> None:
    for file in [*partial.rglob("*"), partial]:
        sync_path(file)
    if out_dir.exists():
        out_dir.rename(old)
    partial.rename(out_dir)
    sync_path(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)
