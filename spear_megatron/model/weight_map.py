"""The one table between Hugging Face tensors and Megatron parameters: names, layers, tensor-parallel cuts.

A Megatron parameter is made of one or more Hugging Face tensors. On one tensor rank, each contributes some runs of
rows (or columns): ``Run``. The same runs serve loading, gathering and export, for weights, biases and gradients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from spear_megatron.model.provider import padded_vocab_size
from spear_megatron.model.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule

# Megatron name within a layer -> (Hugging Face names within a layer, cut). Two spellings of the norms: plain spec and
# Transformer Engine, which fuses a norm into the linear after it.
LAYER_TABLE: dict[str, tuple[tuple[str, ...], str]] = {
    "input_layernorm.weight": (("input_layernorm.weight",), "replicated"),
    "self_attention.linear_qkv.layer_norm_weight": (("input_layernorm.weight",), "replicated"),
    "self_attention.linear_qkv.weight": (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    "self_attention.linear_qkv.bias": (
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
    ),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), "replicated"),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), "replicated"),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), "columns"),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), "replicated"),
    "mlp.linear_fc1.layer_norm_weight": (("post_attention_layernorm.weight",), "replicated"),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "stacked_rows"),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), "columns"),
}
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class Run(NamedTuple):
    """``length`` rows (columns) of a Hugging Face tensor from ``hf_start``, at ``local_start`` of the parameter."""

    hf_start: int
    local_start: int
    length: int


@dataclass(frozen=True)
class Piece:
    """The part that one Hugging Face tensor has in one local parameter.

    ``dim`` is the cut dimension; ``runs[tp_rank]`` are the runs of every tensor rank, in the order of the parameter.
    A replicated tensor has the same single run on every rank; ``padded`` parameters have rows of no tensor at the end.
    """

    hf_name: str
    parameter: torch.nn.Parameter
    dim: int
    runs: tuple[tuple[Run, ...], ...]
    replicated: bool
    padded: bool


def local_pieces(model_chunks: Sequence[MegatronModule], shape: ModelShape, tp_size: int) -> dict[str, list[Piece]]:
    """Hugging Face name -> its pieces on this rank, in the order of ``shape.parameter_shapes()``.

    One piece each, but for tied embeddings when this rank holds both the embedding and a separate output copy.

    Raises:
        ValueError: a parameter of the model is not in the table, or its shape does not fit the model's.
    """
    hf_shapes = shape.parameter_shapes()
    found: dict[str, list[Piece]] = {}
    for chunk in model_chunks:
        gpt = unwrap(chunk)
        for name, parameter in gpt.named_parameters():
            hf_names, cut = _lookup(name, gpt, shape)
            for index, hf_name in enumerate(hf_names):
                dim, runs = tensor_runs(shape, hf_shapes[hf_name], index, cut, tp_size)
                piece = Piece(hf_name, parameter, dim, runs, replicated=cut == "replicated", padded=cut == "vocab")
                found.setdefault(hf_name, []).append(piece)
            expected = local_shape(shape, [hf_shapes[hf_name] for hf_name in hf_names], cut, tp_size)
            if expected != tuple(parameter.shape):
                raise ValueError(f"Megatron parameter {name} has shape {tuple(parameter.shape)}, expected {expected}")
    return {name: found[name] for name in hf_shapes if name in found}


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside the data-parallel wrapper."""
    inner: Any = chunk
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def _lookup(name: str, gpt: GPTModel, shape: ModelShape) -> tuple[tuple[str, ...], str]:
    if name == EMBEDDING:
        return ("model.embed_tokens.weight",), "vocab"
    if name == OUTPUT:
        return ("model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight",), "vocab"
    if name == FINAL_NORM:
        return ("model.norm.weight",), "replicated"
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in LAYER_TABLE:
        raise ValueError(f"Megatron parameter {name} has no Hugging Face counterpart in the weight map")
    layer: Any = gpt.decoder.layers[int(match[1])]
    hf_names, cut = LAYER_TABLE[match[2]]  # layer_number is 1-based and counts over the whole model
    return tuple(f"model.layers.{layer.layer_number - 1}.{hf_name}" for hf_name in hf_names), cut


def tensor_runs(
    shape: ModelShape, hf_shape: tuple[int, ...], index: int, cut: str, tp_size: int
) -> tuple[int, tuple[tuple[Run, ...], ...]]:
    """(cut dimension, runs of every tensor rank) of the ``index``-th Hugging Face tensor of a parameter.

    Args:
        cut: how the parameter is cut over tensor ranks, the second column of ``LAYER_TABLE``; ``vocab`` for the others.
    """
    if cut == "replicated":
        return 0, ((Run(0, 0, hf_shape[0]),),) * tp_size
    if cut == "qkv":
        return 0, tuple(_qkv_runs(shape, index, rank, tp_size) for rank in range(tp_size))
    if cut == "vocab":
        part = padded_vocab_size(shape.vocab_size, tp_size) // tp_size
        ends = [max(0, min(part, shape.vocab_size - rank * part)) for rank in range(tp_size)]
        return 0, tuple((Run(rank * part, 0, end),) if end else () for rank, end in enumerate(ends))
    dim = 1 if cut == "columns" else 0
    part = hf_shape[dim] // tp_size
    return dim, tuple((Run(rank * part, index * part, part),) for rank in range(tp_size))


def _qkv_runs(shape: ModelShape, index: int, rank: int, tp_size: int) -> tuple[Run, ...]:
    """Megatron interleaves by key/value group: the queries of group g, its key, its value, then group g + 1.

    The joint rows are then cut evenly over the tensor ranks, through the middle of a group when there are fewer
    groups than ranks.
    """
    queries = shape.num_attention_heads // shape.num_key_value_heads
    offset = (0, queries, queries + 1)[index] * shape.head_dim
    rows = (queries if index == 0 else 1) * shape.head_dim
    group_rows = (queries + 2) * shape.head_dim
    part = shape.num_key_value_heads * group_rows // tp_size
    low, high = rank * part, (rank + 1) * part
    runs = []
    for group in range(shape.num_key_value_heads):
        start = group * group_rows + offset
        first, last = max(start, low), min(start + rows, high)
        if first < last:
            runs.append(Run(group * rows + first - start, first - low, last - first))
    return tuple(runs)


def local_shape(
    shape: ModelShape, hf_shapes: list[tuple[int, ...]], cut: str, tp_size: int
) -> tuple[int, ...]:
    """Shape of the parameter that tensors of these shapes make on one tensor rank."""
    local = list(hf_shapes[0])
    if cut == "vocab":
        local[0] = padded_vocab_size(shape.vocab_size, tp_size) // tp_size
    elif cut == "columns":
        local[1] //= tp_size
    elif cut in ("qkv", "stacked_rows"):
        local[0] = sum(hf_shape[0] for hf_shape in hf_shapes) // tp_size
    return tuple(local)
