"""Tensors in the form that SGLang's ``update_weights_from_tensor`` reads: a base64 pickle.

The server unpickles by an allow-list, without importing anything of ours: only builtins, torch's rebuild functions and
SGLang's own metadata class may be named. SGLang is not needed here; its class is written by name.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import torch
import torch.multiprocessing  # registers how ForkingPickler shares tensors  # noqa: F401
from torch.multiprocessing import reductions

from spear_megatron.weights.plan import Bucket

FLATTENED = "flattened_bucket"
"""The ``load_format`` of :func:`flat_payload`."""
_METADATA_MODULE = "sglang.srt.weight_sync.tensor_bucket"
Transport = Literal["http", "shared_memory", "cuda_ipc"]


@dataclass
class FlattenedTensorMetadata:
    """SGLang's description of one tensor in a flat uint8 tensor: bytes ``start_idx`` to ``end_idx``, ``numel`` bytes.

    The attributes are the server's. Pickled as the class of that name in SGLang.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def flat_payload(bucket: Bucket, flat: torch.Tensor, dtype: torch.dtype, transport: Transport = "http") -> str:
    """A bucket for ``load_format="flattened_bucket"``.

    Args:
        flat: uint8 [num_bytes]. It must stay as it is until the server has answered, unless ``transport`` is http.
        transport: http puts the bytes into the payload; shared_memory a name to be opened on this host (``flat`` from
            ``memory.shared_bytes``); cuda_ipc a handle to this GPU's memory.

    Raises:
        ValueError: ``flat`` is not where ``transport`` needs it.
    """
    wanted = "cuda" if transport == "cuda_ipc" else "cpu"
    if flat.device.type != wanted or (transport == "shared_memory" and not flat.is_shared()):
        raise ValueError(f"transport {transport} needs a bucket in {transport} memory, got one on {flat.device}")
    metadata = [
        FlattenedTensorMetadata(e.name, e.shape, dtype, e.start, e.start + e.num_bytes, e.num_bytes)
        for e in bucket.entries
    ]
    flat = _alone(flat) if transport == "http" else flat
    return _encode({"flattened_tensor": flat, "metadata": metadata}, transport)


def named_payload(tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Separate tensors, on the host, for ``load_format=None``; their bytes are part of the payload."""
    return _encode([(name, _alone(tensor.contiguous())) for name, tensor in tensors], "http")


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own: a pickled view would bring the rest of its storage along."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _encode(value: Any, transport: Transport) -> str:
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol=4)
    if transport == "shared_memory":
        # by file name: a file descriptor could only be handed to a child process
        before = torch.multiprocessing.get_sharing_strategy()
        pickler.dispatch_table = ForkingPickler(io.BytesIO()).dispatch_table  # type: ignore[attr-defined]
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            pickler.dump(value)
        finally:
            torch.multiprocessing.set_sharing_strategy(before)
    else:
        pickler.dump(value)
    return base64.b64encode(stream.getbuffer()).decode("ascii")


class _Pickler(pickle._Pickler):
    """Writes the metadata class under SGLang's name, and GPU tensors as handles with the UUID of their device.

    The Python pickler, because only it lets the name of a class be chosen; large byte strings pass through it at once.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is not FlattenedTensorMetadata:
            super().save_global(obj, name)  # type: ignore[misc]
            return
        self.save(_METADATA_MODULE)  # type: ignore[attr-defined]
        self.save(obj.__qualname__)  # type: ignore[attr-defined]
        self.write(pickle.STACK_GLOBAL)  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor) or not obj.is_cuda:
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        # the index of a device differs between processes; SGLang looks the UUID up
        return rebuild, (*arguments[:6], uuid, *arguments[7:])
