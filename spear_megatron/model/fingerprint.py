"""A fingerprint of a model folder: tells whether two places hold the same model, or one place still the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_WHOLE_BYTES = 32 << 20
_BLOCK_BYTES = 64 << 10
_NUM_BLOCKS = 512
_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")


def model_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the model's files: weights, configuration, tokenizer, chat template.

    Files above 32 MiB enter with their size and 512 evenly spaced blocks of 64 KiB, the first and the last included:
    a training step changes every one of them, and 64 GiB of weights take a second.

    Raises:
        ValueError: the folder holds no such file.
    """
    digest = hashlib.sha256()
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix in _SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{folder} is no model folder in Hugging Face format")
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as stream:
            if size <= _WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for block in range(_NUM_BLOCKS):
                stream.seek((size - _BLOCK_BYTES) * block // (_NUM_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return f"sha256:{digest.hexdigest()}"


def same_model(one: str | Path, other: str | Path) -> bool:
    """Whether two folders that can be read here are one, or hold the same files of a model."""
    if not (os.path.isdir(one) and os.path.isdir(other)):
        return False
    return os.path.realpath(one) == os.path.realpath(other) or model_fingerprint(one) == model_fingerprint(other)
