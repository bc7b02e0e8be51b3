"""Conversion between a Hugging Face folder and a Megatron checkpoint, bit for bit, in one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spear_megatron.checkpoint import assets, sharded
from spear_megatron.checkpoint.locate import find_checkpoint
from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.checkpoint.states import decode_states
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.device.platform import Platform
from spear_megatron.model.hf_export import export_hf
from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.hf_io import load_hf_folder
from spear_megatron.model.provider import build_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.transformer_config import check_layout
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.state import ParallelState, initialize

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

STATE = "conversion"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def hf_to_mcore(hf: Path, out: Path, *, tp: int, pp: int) -> Path:
    """Write the weights of a Hugging Face folder, its config and its tokenizer as a checkpoint of step 0 in ``out``.

    Args:
        tp, pp: the layout it is meant for: checked against the model and recorded. A checkpoint loads at any layout,
            so the bytes do not depend on it.

    Returns:
        The step folder.

    Raises:
        ValueError: ``out`` is not empty, the folder is no model, its weights mix dtypes, or the layout does not fit.
        CheckpointError: it could not be written.
    """
    if out.exists() and (not out.is_dir() or next(out.iterdir(), None) is not None):
        raise ValueError(f"{out} exists and is not empty: give a new folder")
    shape = ModelShape.from_folder(hf)
    check_layout(shape, MegatronConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    dtype = _weights_dtype(hf, shape)
    with _one_process() as parallel:
        # Half precision is not trained in; float32 holds it exactly.
        model_dtype = torch.float32 if dtype == torch.float16 else dtype
        chunks = _bare_model(shape, model_dtype, parallel)
        load_hf_folder(chunks, shape, hf, parallel)
        manager = CheckpointManager(out, parallel=parallel, keep=1, assets=hf)
        layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        manager.save(0, chunks, None, None, {STATE: {"dtype": str(dtype).removeprefix("torch."), **layout}})
        return out / "step_00000000"


def mcore_to_hf(mcore: Path, out: Path) -> Path:
    """Write a checkpoint (``find_checkpoint`` says what may be given) as a Hugging Face folder, in its own dtype.

    Returns:
        The step folder that was converted.

    Raises:
        ValueError: ``out`` is not empty, or there is no usable checkpoint with a model's config.
        OSError: ``out`` could not be written.
    """
    if out.exists() and (not out.is_dir() or next(out.iterdir(), None) is not None):
        raise ValueError(f"{out} exists and is not empty: give a new folder")
    folder, manifest = find_checkpoint(mcore)
    source = folder / assets.FOLDER
    if not (source / "config.json").is_file():
        raise ValueError(f"{folder} carries no {assets.FOLDER}/config.json, so its model cannot be rebuilt")
    shape = ModelShape.from_folder(source)
    conversion = decode_states(folder, manifest).get(STATE)
    with _one_process() as parallel:
        dtype = _stored_dtype(folder)
        chunks = _bare_model(shape, dtype, parallel)
        sharded.load_sharded(parallel, folder / sharded.FOLDER, chunks, None)
        wanted = getattr(torch, conversion["dtype"]) if conversion else dtype
        export_hf(chunks, shape, parallel, out, source, dtype=wanted)
    for path in assets.asset_files(source):
        target = out / path.relative_to(source)
        if conversion or not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    return folder


def _bare_model(shape: ModelShape, dtype: torch.dtype, parallel: ParallelState) -> list[MegatronModule]:
    return build_model(shape, MegatronConfig(), dtype=dtype, parallel=parallel, kernels="eager", with_ddp=False)


def _weights_dtype(hf: Path, shape: ModelShape) -> torch.dtype:
    from safetensors import safe_open

    found: dict[str, str] = {}
    for file in sorted(set(HFWeights.open(hf, shape).files.values())):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found.setdefault(opened.get_slice(name).get_dtype(), name)
    if len(found) != 1:
        example = ", ".join(f"{name} is {dtype}" for dtype, name in sorted(found.items()))
        raise ValueError(f"{hf} mixes dtypes ({example}): convert all weights to one of them first")
    return _DTYPES[next(iter(found))]


def _stored_dtype(folder: Path) -> torch.dtype:
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_tensors_metadata(str(folder / sharded.FOLDER))
    dtypes = {value.dtype for key, value in tensors.items() if not key.startswith("optimizer.")}
    if len(dtypes) != 1:
        raise ValueError(f"{folder} mixes weight dtypes {sorted(map(str, dtypes))}")
    return dtypes.pop()


@contextmanager
def _one_process() -> Iterator[ParallelState]:
    with megatron_on_cpu():
        parallel = initialize(platform=Platform(device=torch.device("cpu"), backend="gloo"))
        try:
            if parallel.world_size != 1:
                raise ValueError("convert runs in one process: start it without torchrun")
            yield parallel
        finally:
            parallel.destroy()
