"""Small states (anything but model and optimizer) to bytes and back."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spear_megatron.checkpoint.errors import DamagedCheckpoint
from spear_megatron.checkpoint.manifest import JSON, SHARDED, TENSORS, Manifest, StateEntry

FOLDER = "states"


def encode_state(name: str, value: Any) -> tuple[StateEntry, bytes]:
    """Serialise one state now, so that later changes of ``value`` do not reach the checkpoint.

    JSON when it survives JSON unchanged (tuples become lists), else, for a structure of dictionaries, lists, plain
    values and tensors, ``torch.save``.

    Raises:
        ValueError: the state holds something else, or dictionaries with keys that are not strings.
    """
    if not name.isidentifier():
        raise ValueError(f"state name {name!r} must be an identifier: it becomes a file name")
    if _holds_tensor(value):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = buffer.getvalue()
        _load_tensors(name, data)
        return StateEntry(TENSORS, f"{FOLDER}/{name}.pt"), data
    try:
        text = json.dumps(value, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state '{name}' must be JSON-able or hold tensors: {error}") from None
    if _has_other_keys(value):
        raise ValueError(f"state '{name}' has a dictionary key that is not a string: JSON would change it")
    return StateEntry(JSON, f"{FOLDER}/{name}.json"), text.encode()


def decode_states(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Every small state of a checkpoint by name; tensors on the CPU.

    Raises:
        DamagedCheckpoint: a file does not decode (its checksum is right, so it was written by something else).
    """
    states: dict[str, Any] = {}
    for name, entry in manifest.states.items():
        if entry.kind == SHARDED:
            continue
        data = (folder / entry.path).read_bytes()
        try:
            states[name] = json.loads(data) if entry.kind == JSON else _load_tensors(name, data)
        except ValueError as error:
            raise DamagedCheckpoint(f"state '{name}' does not decode: {error}") from None
    return states


def _load_tensors(name: str, data: bytes) -> Any:
    import pickle

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"state '{name}' must consist of tensors and plain values: {error}") from None


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensor(item) for item in value)
    return False


def _has_other_keys(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(not isinstance(key, str) or _has_other_keys(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(_has_other_keys(item) for item in value)
    return False
