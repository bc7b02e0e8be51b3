"""What can make training faster on this machine: each feature with whether it is there, why not, and its key."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass

import torch

from spear_megatron.device import optional
from spear_megatron.device.optional import NO_DEVICE, Part

_MEGATRON = "actor_rollout_ref.actor.megatron"
FP8_RECIPES: dict[str, tuple[str, str, tuple[int, int]]] = {
    "delayed": ("DelayedScaling", "check_fp8_support", (8, 9)),
    "tensorwise": ("Float8CurrentScaling", "check_fp8_support", (8, 9)),
    "blockwise": ("Float8BlockScaling", "check_fp8_block_scaling_support", (9, 0)),
    "mxfp8": ("MXFP8BlockScaling", "check_mxfp8_support", (10, 0)),
}
"""Recipe -> its class in Transformer Engine, the function there that knows the device, least compute capability."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One way to be faster.

    Attributes:
        available: it can be switched on here. reason: why not, or which version serves it.
        turns_on: what it does. key: the configuration key that decides, '' if it is taken whenever it is there.
        remedy: what would make it available; '' if nothing can.
    """

    name: str
    available: bool
    reason: str
    turns_on: str
    key: str = ""
    remedy: str = ""


def probe_features() -> dict[str, Feature]:
    """Every feature by a short name. Imports Transformer Engine if it is installed, and asks the current device."""
    engine, apex = optional.transformer_engine(), optional.apex()
    found = {
        "layers": _needs(
            engine,
            "Transformer Engine layers",
            "fused norm and linear, fused rope, its packed and its context-parallel attention, in bfloat16",
            "actor_rollout_ref.actor.kernels",
        ),
        "flash": _flash_attention(engine),
        "fused": _cudnn_attention(engine),
    }
    found |= {recipe: _fp8(engine, recipe) for recipe in FP8_RECIPES}
    found["fused_adam"] = _fused_adam(engine, apex)
    found["gradient_accumulation_fusion"] = _weight_gradient_fusion(apex)
    return found | _communication() | _not_offered()


def _needs(part: Part, name: str, turns_on: str, key: str) -> Feature:
    reason = part.reason or f"{part.name} {part.version}".strip()
    return Feature(name, part.usable, reason if part.usable else f"{part.name}: {reason}", turns_on, key, part.remedy)


def _flash_attention(engine: Part) -> Feature:
    name, key = "flash attention", f"{_MEGATRON}.attention_backend"
    turns_on = "attention of the Transformer Engine layers by the flash-attn package"
    if not engine.usable:
        return _needs(engine, name, turns_on, key)
    for distribution in ("flash-attn-3", "flash-attn"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return Feature(name, True, f"{distribution} {version}", turns_on, key)
    return Feature(
        name, False, "flash-attn is not installed", turns_on, key, "pip install --no-build-isolation flash-attn"
    )


def _cudnn_attention(engine: Part) -> Feature:
    name, key = "cuDNN attention", f"{_MEGATRON}.attention_backend"
    turns_on = "fused attention of the Transformer Engine layers by cuDNN"
    if not engine.usable:
        return _needs(engine, name, turns_on, key)
    version = torch.backends.cudnn.version()
    if version is None:
        return Feature(name, False, "torch finds no cuDNN", turns_on, key, "install a CUDA build of torch with cuDNN")
    digits = 10000 if version >= 90000 else 1000  # 9.10.2 is 91002, 8.9.7 is 8907
    major, minor = version // digits, version % digits // 100
    if _capability() < (8, 0):
        return Feature(name, False, f"compute capability {_dotted(_capability())} is below 8.0", turns_on, key)
    return Feature(name, True, f"cuDNN {major}.{minor}", turns_on, key)


def _fp8(engine: Part, recipe: str) -> Feature:
    """Transformer Engine's own answer where it has one, the compute capability that its recipe needs where not."""
    name, key = f"FP8, {recipe}", f"{_MEGATRON}.fp8_recipe"
    turns_on = f"matrix products of the Transformer Engine layers in FP8 with {_SCALING[recipe]}; weights stay bfloat16"
    if not engine.usable:
        return _needs(engine, name, turns_on, key)
    recipe_class, check, least = FP8_RECIPES[recipe]
    if not hasattr(importlib.import_module("transformer_engine.common.recipe"), recipe_class):
        reason = f"transformer-engine {engine.version} has no {recipe_class}"
        return Feature(name, False, reason, turns_on, key, "install a newer transformer-engine")
    for module in ("transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8"):
        try:
            ask = getattr(importlib.import_module(module), check, None)
        except ModuleNotFoundError:
            continue
        if ask is not None:
            supported, reason = ask()
            return Feature(name, bool(supported), reason or _device_name(), turns_on, key)
    if _capability() < least:
        reason = f"compute capability {_dotted(_capability())} is below {_dotted(least)}"
        return Feature(name, False, reason, turns_on, key)
    return Feature(name, True, _device_name(), turns_on, key)


_SCALING = {
    "delayed": "one factor per tensor from earlier steps",
    "tensorwise": "one factor per tensor from its current values",
    "blockwise": "one factor per block of 128",
    "mxfp8": "one factor per 32 values",
}


def _fused_adam(engine: Part, apex: Part) -> Feature:
    name, turns_on = "fused Adam", "one kernel for the optimizer step, instead of torch's AdamW"
    for part in (engine, apex):
        if part.usable:
            return Feature(name, True, f"{part.name} {part.version}".strip(), turns_on)
    reason = f"{engine.name}: {engine.reason}; {apex.name}: {apex.reason}"
    return Feature(name, False, reason, turns_on, remedy=engine.remedy)


def _weight_gradient_fusion(apex: Part) -> Feature:
    """The extension is a module of its own, which builds of Apex without CUDA extensions lack."""
    name, key = "fused weight gradients", f"{_MEGATRON}.gradient_accumulation_fusion"
    turns_on = "weight gradients of the linear layers are added to the float32 gradient by the product itself"
    if not torch.cuda.is_available():
        return Feature(name, False, NO_DEVICE, turns_on, key)
    if apex.installed and not apex.usable:
        return Feature(name, False, f"apex: {apex.reason}", turns_on, key, apex.remedy)
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except (ImportError, RuntimeError, OSError) as error:
        state = "apex is not installed" if not apex.installed else f"apex has no such extension ({error})"
        return Feature(name, False, state, turns_on, key, optional.APEX_INSTALL)
    return Feature(name, True, f"apex {apex.version}".strip(), turns_on, key)


def _communication() -> dict[str, Feature]:
    backend = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if torch.cuda.is_available() else "gloo"
    return {
        "overlap_grad_reduce": Feature(
            "overlapped gradient reduction", True, backend,
            "buckets of gradients are reduced while the backward pass goes on", f"{_MEGATRON}.overlap_grad_reduce",
        ),
        "overlap_param_gather": Feature(
            "overlapped weight gathering", True, backend,
            "updated weights are gathered bucket by bucket in the next forward pass",
            f"{_MEGATRON}.overlap_param_gather",
        ),
        "overlap_p2p_comm": Feature(
            "overlapped pipeline messages", True, backend,
            "stages send while they compute (virtual pipeline)", f"{_MEGATRON}.overlap_p2p_comm",
        ),
    }  # fmt: skip


def _not_offered() -> dict[str, Feature]:
    """What others offer and this trainer does not: the reasons are facts of the trainer, not of the machine."""
    fixed = "micro-batches are packed to a length of their own in every step"
    return {
        "tp_comm_overlap": Feature(
            "overlapped tensor-parallel messages", False, f"not offered: its buffers have one fixed size, and {fixed}",
            "gathers and scatters of sequence parallelism inside the products",
        ),
        "cuda_graph": Feature(
            "CUDA graphs of the layers", False, f"not offered: a graph replays one fixed shape, and {fixed}",
            "no launch overhead in training (SGLang's decoding has graphs of its own)",
        ),
    }  # fmt: skip


def _capability() -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability()
    return major, minor


def _device_name() -> str:
    return f"compute capability {_dotted(_capability())}"


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
