"""Hugging Face tensors into the decoder's fused layout, with every name accounted for."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from spear_megatron.kernels.decoder import Decoder
from spear_megatron.model.shape import ModelShape


def load_weights(decoder: Decoder, shape: ModelShape, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace every weight of the decoder, one tensor at a time, in the order in which they arrive.

    Raises:
        ValueError: a name that the model does not have or that came twice, a shape that does not fit, a tensor that is
            not floating point, or names that never came. The decoder then holds a mixture and must not be used.
    """
    expected = shape.parameter_shapes()
    missing = dict.fromkeys(expected)
    for name, tensor in named_tensors:
        if name not in expected:
            raise ValueError(f"weight {name!r} does not belong to this {shape.architecture} model")
        if name not in missing:
            raise ValueError(f"weight {name!r} was given twice in one update")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"weight {name!r} has shape {tuple(tensor.shape)}, the model needs {expected[name]}")
        if not tensor.is_floating_point():
            raise ValueError(f"weight {name!r} has dtype {tensor.dtype}, it must be floating point")
        kind, layer = _place(name)
        decoder.load(kind, layer, tensor)
        if kind == "embed_tokens" and shape.tie_word_embeddings:
            decoder.load("lm_head", -1, tensor)
        del missing[name]
    if missing:
        first = next(iter(missing))
        raise ValueError(f"{len(missing)} of {len(expected)} weights are missing in the update, the first is {first!r}")


def _place(name: str) -> tuple[str, int]:
    """('q_proj.bias', 3) of 'model.layers.3.self_attn.q_proj.bias'; layer -1 where there is none."""
    parts = name.split(".")
    kind = parts[-2] + (".bias" if parts[-1] == "bias" else "")
    return kind, int(parts[2]) if len(parts) > 3 and parts[1] == "layers" else -1
