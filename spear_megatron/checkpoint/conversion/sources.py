"""What a Megatron checkpoint is converted from: one of this package, or one of Megatron-LM's training script."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from spear_megatron.checkpoint import assets, sharded
from spear_megatron.checkpoint.conversion.to_mcore import STATE
from spear_megatron.checkpoint.conversion.torch_dist import METADATA_NAME
from spear_megatron.checkpoint.locate import CheckFiles, checkpoint_folders, find_checkpoint
from spear_megatron.checkpoint.manifest import MANIFEST_NAME
from spear_megatron.checkpoint.states import decode_states
from spear_megatron.model.shape import ModelShape

logger = logging.getLogger(__name__)

TRACKER_NAME = "latest_checkpointed_iteration.txt"
# Megatron-LM's argument -> what it must be for a model of this shape.
_ARGUMENTS: dict[str, str] = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_norm",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}


@dataclass(frozen=True)
class McoreSource:
    """A checkpoint to read.

    Attributes:
        folder: what the user would call the checkpoint.
        sharded: the folder with the tensors.
        config: folder with ``config.json`` and tokenizer.
        identity: changes when the checkpoint does.
        conversion: what ``hf-to-mcore`` noted, None for a checkpoint of a training run.
    """

    folder: Path
    sharded: Path
    config: Path
    identity: str
    conversion: Mapping[str, Any] | None

    @property
    def by_megatron_lm(self) -> bool:
        """Whether Megatron-LM's script wrote it, without a manifest."""
        return self.folder == self.sharded


def find_source(path: Path, hf_config: Path | None, check: CheckFiles | None) -> McoreSource:
    """The checkpoint that ``path`` means: a step folder, a folder of checkpoints or a run directory of this package, or
    an iteration folder of Megatron-LM or the folder of its checkpoints.

    Args:
        hf_config: folder with ``config.json`` and tokenizer; needed where the checkpoint brings none.
        check: compares the files of a checkpoint with its manifest; None skips that.

    Raises:
        ValueError: there is no usable checkpoint, or nothing tells its model's config.
    """
    stock = None if checkpoint_folders(path) else _megatron_lm_folder(path)
    if stock is not None:
        if hf_config is None:
            raise ValueError(
                f"{stock} was written by Megatron-LM, which keeps no Hugging Face config: give --hf-config DIR, "
                "a folder with config.json and the tokenizer"
            )
        files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in stock.iterdir())
        return McoreSource(stock, stock, hf_config, _digest(files), None)
    folder, manifest = find_checkpoint(path, check or (lambda folder, manifest: []))
    config = hf_config or folder / assets.FOLDER
    if not (config / "config.json").is_file():
        raise ValueError(f"{config} has no config.json, so the model cannot be rebuilt: give --hf-config DIR")
    identity = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    conversion = decode_states(folder, manifest).get(STATE)
    return McoreSource(folder, folder / sharded.FOLDER, config, identity, conversion)


def check_arguments(folder: Path, shape: ModelShape) -> None:
    """Compare what Megatron-LM noted of its model with ``shape``, as far as it noted something.

    Shapes of tensors alone do not tell the number of heads, nor the base of the rotary embedding.

    Raises:
        ValueError: they differ; names the argument and both values.
    """
    noted = _noted_arguments(folder / sharded.COMMON_NAME)
    if noted.get("group_query_attention") is False:
        noted.pop("num_query_groups", None)
    for argument, field in _ARGUMENTS.items():
        wanted, found = getattr(shape, field), noted.get(argument)
        if isinstance(found, (bool, int, float)) and abs(float(found) - float(wanted)) > 1e-6 * abs(float(wanted)):
            raise ValueError(
                f"{folder} was trained with {argument}={found}, but config.json says {wanted} ({field}): "
                "give the config of that model"
            )
    tied = noted.get("untie_embeddings_and_output_weights")
    if isinstance(tied, bool) and tied == shape.tie_word_embeddings:
        raise ValueError(
            f"{folder} was trained with untie_embeddings_and_output_weights={tied}, but config.json says "
            f"tie_word_embeddings={shape.tie_word_embeddings}: give the config of that model"
        )


def _megatron_lm_folder(path: Path) -> Path | None:
    tracker = path / TRACKER_NAME
    folder = path
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8").strip()
        if text != "release" and not text.isdecimal():
            raise ValueError(f"{tracker} must hold an iteration number or 'release', got {text[:40]!r}")
        folder = path / (text if text == "release" else f"iter_{int(text):07d}")
        if not folder.is_dir():
            raise ValueError(f"{tracker} names {folder.name}, which is missing in {path}")
    if any(folder.glob("mp_rank_*/model_optim_rng.pt")):
        raise ValueError(f"{folder} is in Megatron-LM's legacy format: save it with --ckpt-format torch_dist")
    return folder if (folder / METADATA_NAME).is_file() else None


def _noted_arguments(path: Path) -> dict[str, Any]:
    """The plain values among the arguments in ``common.pt``; nothing in the file is executed."""
    if not path.is_file():
        return {}
    tools = SimpleNamespace(Unpickler=_PlainUnpickler, load=pickle.load, __name__="plain_pickle")
    try:
        common = torch.load(path, map_location="cpu", weights_only=False, pickle_module=tools)
        return dict(vars(common["args"]))
    except Exception as error:  # a hint is lost, no more: whatever a foreign file holds may fail in any way
        logger.warning("the arguments in %s cannot be read and were not compared: %s", path, error)
        return {}


class _PlainUnpickler(pickle.Unpickler):
    """Knows argument namespaces and tensors; everything else becomes an empty object."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of a plain value, or a stand-in that accepts anything."""
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        if (module, name) == ("collections", "OrderedDict") or module == "torch._utils":
            return super().find_class(module, name)
        return _Unknown


class _Unknown:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
