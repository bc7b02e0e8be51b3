"""The weight map of the whole model as a Megatron checkpoint stores it, with no tensor or pipeline cut.

A distributed checkpoint holds global tensors. At tensor parallel size 1 every parameter is made of whole rows of
Hugging Face tensors, so that conversion moves rows and computes nothing. Layers of a kind are stacked: their global
tensor has the layer as its first dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from spear_megatron.model.shape import ModelShape
from spear_megatron.model.weight_map import EMBEDDING, FINAL_NORM, LAYER_TABLE, OUTPUT, local_shape, tensor_runs

LAYERS = "decoder.layers."
# Transformer Engine's name, which is the one written, and that of a norm which is a module of its own.
SEPARATE_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_EXTRA_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


class Segment(NamedTuple):
    """``length`` rows of the Hugging Face tensor ``hf_name`` from ``hf_start``, at row ``start`` of the parameter."""

    hf_name: str
    hf_start: int
    start: int
    length: int


@dataclass(frozen=True)
class GlobalParameter:
    """One parameter of the whole model.

    Attributes:
        name: Megatron's name, within a layer if there is one.
        layer: 0-based layer, None for what belongs to no layer.
        shape: [rows, columns] or [rows], without the layer dimension.
        segments: the rows it is made of, in its own order; rows of no segment are padding (zeros) at the end.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def key(self) -> str:
        """Key of the global tensor in a checkpoint."""
        return self.name if self.layer is None else LAYERS + self.name

    @property
    def places(self) -> tuple[tuple[str, int | None], ...]:
        """Keys under which checkpoints hold it, with the index in the layer dimension where that key has one.

        The one written comes first; then norms that are modules of their own, and layers that are not stacked.
        """
        if self.layer is None:
            return ((self.name, None),)
        names = [self.name, *([SEPARATE_NORMS[self.name]] if self.name in SEPARATE_NORMS else [])]
        stacked = tuple((LAYERS + name, self.layer) for name in names)
        return stacked + tuple((f"{LAYERS}{self.layer}.{name}", None) for name in names)

    @property
    def numel(self) -> int:
        """Number of weights, padding included."""
        return prod(self.shape)


def global_parameters(shape: ModelShape) -> list[GlobalParameter]:
    """Every parameter of the model, in the order of the layers. The output layer of a tied model is none."""
    hf_shapes = shape.parameter_shapes()

    def parameter(name: str, layer: int | None, hf_names: tuple[str, ...], cut: str) -> GlobalParameter:
        whole_rows = "replicated" if cut == "columns" else cut  # no column is cut on one tensor rank
        segments = [
            Segment(hf_name, run.hf_start, run.local_start, run.length)
            for index, hf_name in enumerate(hf_names)
            for run in tensor_runs(shape, hf_shapes[hf_name], index, whole_rows, 1)[1][0]
        ]
        whole = local_shape(shape, [hf_shapes[hf_name] for hf_name in hf_names], cut, 1)
        return GlobalParameter(name, layer, whole, tuple(sorted(segments, key=lambda segment: segment.start)))

    found = [parameter(EMBEDDING, None, ("model.embed_tokens.weight",), "vocab")]
    written = [name for name in LAYER_TABLE if name not in SEPARATE_NORMS.values()]
    for layer in range(shape.num_layers):
        for name in written:
            hf_names, cut = LAYER_TABLE[name]
            hf_names = tuple(f"model.layers.{layer}.{hf_name}" for hf_name in hf_names)
            if hf_names[0] in hf_shapes:  # biases and norms of heads are of one architecture only
                found.append(parameter(name, layer, hf_names, cut))
    found.append(parameter(FINAL_NORM, None, ("model.norm.weight",), "replicated"))
    if not shape.tie_word_embeddings:
        found.append(parameter(OUTPUT, None, ("lm_head.weight",), "vocab"))
    return found


def segments_of(parameters: list[GlobalParameter]) -> dict[str, list[tuple[GlobalParameter, Segment]]]:
    """Hugging Face name -> where its rows are, in the order of its rows."""
    found: dict[str, list[tuple[GlobalParameter, Segment]]] = {}
    for parameter in parameters:
        for segment in parameter.segments:
            found.setdefault(segment.hf_name, []).append((parameter, segment))
    for places in found.values():
        places.sort(key=lambda place: place[1].hf_start)
    return found


def extra_state_keys(shape: ModelShape) -> list[str]:
    """Keys of the states, empty without fp8, that Megatron's linear layers save beside their weights."""
    total = shape.num_layers
    return [
        f"{LAYERS}{name}._extra_state/shard_{layer}_{total}" for layer in range(total) for name in _EXTRA_STATES
    ]
