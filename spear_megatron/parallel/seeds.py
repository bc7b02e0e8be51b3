"""Keyed randomness: every random choice names its seed, its purpose and the ids it belongs to."""

from __future__ import annotations

import hashlib

import torch


def derive_key(seed: int, purpose: str, *ids: int) -> int:
    """64-bit key of (seed, purpose, ids): the first 8 bytes, little endian, of a blake2b hash.

    Distinct arguments give independent keys: the encoding is injective and never depends on rank or layout.
    """
    message = f"{int(seed)}:{len(purpose)}:{purpose}:" + ",".join(str(int(i)) for i in ids)
    return int.from_bytes(hashlib.blake2b(message.encode(), digest_size=8).digest(), "little")


def generator(seed: int, purpose: str, *ids: int) -> torch.Generator:
    """CPU generator seeded with ``derive_key(seed, purpose, *ids)``."""
    return torch.Generator(device="cpu").manual_seed(derive_key(seed, purpose, *ids))
