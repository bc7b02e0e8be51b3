"""Decides which optional kernels a model is built with, and refuses what was asked for and cannot be had."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spear_megatron.device.features import Feature, probe_features
from spear_megatron.device.platform import Platform
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig

_ACTOR = "actor_rollout_ref.actor"
_PREFIX = f"{_ACTOR}.megatron"


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What a model is built with.

    Attributes:
        transformer_engine: layers of Transformer Engine, not the plain ones.
        weight_gradient_fusion: linear layers add to the float32 gradient inside their product (Apex).
    """

    transformer_engine: bool = False
    weight_gradient_fusion: bool = False


def check_acceleration(shape: ModelShape, megatron: MegatronConfig, kernels: str, dtype: str) -> None:
    """Refuse what no machine can do with this model and these settings.

    Raises:
        ValueError: names the key, the cause and the remedy.
    """
    asked = _needs_layers(megatron)
    if asked and (kernels != "auto" or dtype != "bf16"):
        raise ValueError(
            f"{_PREFIX}.{asked} is for the layers of Transformer Engine, taken with {_ACTOR}.kernels=auto and "
            f"actor_rollout_ref.model.dtype=bf16, not {kernels} and {dtype}: set these, or leave the key out"
        )
    if megatron.fp8 is not None:
        _check_fp8_sizes(shape, megatron)


def _check_fp8_sizes(shape: ModelShape, megatron: MegatronConfig) -> None:
    tp, multiple = megatron.tensor_model_parallel_size, megatron.fp8_multiple
    rows = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    sizes = {
        "hidden_size": shape.hidden_size,
        "intermediate_size / tensor size": shape.intermediate_size // tp,
        "columns of the attention's output / tensor size": shape.num_attention_heads * shape.head_dim // tp,
        "rows of the joint query/key/value projection / tensor size": rows // tp,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise ValueError(
                f"{_PREFIX}.fp8={megatron.fp8} needs sizes that are multiples of {multiple}, but {name} is {size} with "
                f"{_PREFIX}.tensor_model_parallel_size={tp}: lower that size, or set fp8=null"
            )


def choose_acceleration(
    megatron: MegatronConfig,
    kernels: str,
    platform: Platform,
    dtype: torch.dtype,
    features: dict[str, Feature] | None = None,
) -> Acceleration:
    """What to build with on this machine: ``auto`` takes what is there, anything asked for by name must be there.

    Transformer Engine layers are taken on CUDA in bfloat16 (their packed attention has no float32 form); ``eager``
    never takes them.

    Args:
        kernels: ``actor_rollout_ref.actor.kernels``, auto or eager.
        features: what the machine has; probed if anything depends on it and None is given.

    Raises:
        ValueError: an unknown ``kernels``, or something asked for that is not there: key, cause and remedy.
    """
    if kernels not in ("auto", "eager"):
        raise ValueError(f"{_ACTOR}.kernels must be auto or eager, got {kernels!r}")
    asked, fusion = _needs_layers(megatron), megatron.gradient_accumulation_fusion
    if not platform.is_cuda and not asked and fusion is not True:
        return Acceleration()
    found = probe_features() if features is None else features
    layers = kernels == "auto" and platform.is_cuda and dtype == torch.bfloat16 and found["layers"].available
    if asked:
        _require(f"{_PREFIX}.{asked}", found["layers"])
        if not layers:
            raise ValueError(
                f"{_PREFIX}.{asked} is for the layers of Transformer Engine, which are taken on CUDA in bfloat16 with "
                f"{_ACTOR}.kernels=auto, not on {platform.device.type} in {dtype} with {kernels}"
            )
    if megatron.fp8 is not None:
        _require(f"{_PREFIX}.fp8={megatron.fp8} with fp8_recipe={megatron.fp8_recipe}", found[megatron.fp8_recipe])
    if megatron.attention_backend != "auto":
        _require(f"{_PREFIX}.attention_backend={megatron.attention_backend}", found[megatron.attention_backend])
    feature = found["gradient_accumulation_fusion"]
    if fusion is True:
        _require(f"{_PREFIX}.gradient_accumulation_fusion=true", feature)
    return Acceleration(layers, fusion is True or (fusion == "auto" and platform.is_cuda and feature.available))


def _needs_layers(megatron: MegatronConfig) -> str:
    """The first setting that acts only in the layers of Transformer Engine, as key=value; '' without any."""
    if megatron.fp8 is not None:
        return f"fp8={megatron.fp8}"
    return "" if megatron.attention_backend == "auto" else f"attention_backend={megatron.attention_backend}"


def _require(setting: str, feature: Feature) -> None:
    if not feature.available:
        remedy = f"{feature.remedy}, or leave the key out" if feature.remedy else "leave the key out"
        raise ValueError(f"{setting} cannot be had on this machine, {feature.name}: {feature.reason}. Remedy: {remedy}")
