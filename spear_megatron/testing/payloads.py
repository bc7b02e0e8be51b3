"""Reads the weight payloads that a server is sent, without SGLang: what stand-ins for its server look into."""

from __future__ import annotations

import base64
import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

METADATA = ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata")


@dataclass
class Metadata:
    """SGLang's class, as its server would see it."""

    name: str
    shape: Any
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class Unpickler(pickle.Unpickler):
    """Resolves SGLang's class to ours, and remembers every name that a payload asks for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.asked: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of that name."""
        self.asked.add((module, name))
        return Metadata if (module, name) == METADATA else super().find_class(module, name)


def read_payload(text: str) -> tuple[dict[str, torch.Tensor], set[tuple[str, str]]]:
    """(tensors by name, names of the classes and functions that the pickle asks for).

    Raises:
        ValueError: the text is no base64, or the metadata does not cover the flat tensor.
    """
    unpickler = Unpickler(base64.b64decode(text, validate=True))
    value = unpickler.load()
    if isinstance(value, list):
        return {name: tensor.clone() for name, tensor in value}, unpickler.asked
    flat = value["flattened_tensor"]
    tensors = {
        meta.name: flat[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape).clone()
        for meta in value["metadata"]
    }
    if (covered := sum(meta.numel for meta in value["metadata"])) != flat.numel():
        raise ValueError(f"the metadata covers {covered} of {flat.numel()} bytes")
    return tensors, unpickler.asked
