"""Which tensors travel together, and which data-parallel rank gathers and sends them: pure, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a bucket: ``num_bytes`` bytes from ``start`` on, row-major."""

    name: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def view(self, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor inside a bucket's bytes (uint8 [num_bytes of the bucket]); shares its memory."""
        return flat[self.start : self.start + self.num_bytes].view(dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that are gathered and sent as one flat run of bytes, by data-parallel rank ``owner``."""

    index: int
    owner: int
    entries: tuple[Entry, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return self.entries[-1].start + self.entries[-1].num_bytes


@dataclass(frozen=True)
class SyncPlan:
    """Every tensor of the model in buckets of at most ``limit_bytes``, but for tensors that alone exceed it.

    The last bucket belongs to rank 0 and closes an update: it is sent when all others have arrived.
    """

    buckets: tuple[Bucket, ...]
    dtype: torch.dtype
    limit_bytes: int

    @property
    def closing(self) -> Bucket:
        """The bucket that is sent last."""
        return self.buckets[-1]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(bucket.num_bytes for bucket in self.buckets)

    @property
    def oversized(self) -> tuple[str, ...]:
        """Tensors larger than ``limit_bytes``, each a bucket of its own."""
        large = [bucket for bucket in self.buckets if bucket.num_bytes > self.limit_bytes]
        return tuple(entry.name for bucket in large for entry in bucket.entries)

    def owned_by(self, rank: int) -> tuple[Bucket, ...]:
        """What one data-parallel rank gathers and sends before the closing bucket, in order."""
        return tuple(bucket for bucket in self.buckets[:-1] if bucket.owner == rank)


def plan_sync(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, limit_bytes: int, num_owners: int
) -> SyncPlan:
    """Cut the model into buckets in the order of ``shapes`` and deal them over ``num_owners`` ranks, even by bytes.

    A model smaller than ``num_owners`` full buckets is cut finer, so that every rank has work where possible.

    Raises:
        ValueError: an argument is not positive, or there are no tensors.
    """
    if limit_bytes < 1 or num_owners < 1 or not shapes:
        raise ValueError(
            f"limit_bytes ({limit_bytes}) and num_owners ({num_owners}) must be positive, and there must be a tensor "
            f"(got {len(shapes)})"
        )
    total = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
    parts = _cut(shapes, dtype.itemsize, min(limit_bytes, -(-total // num_owners)))
    owners = _deal([part[-1].start + part[-1].num_bytes for part in parts], num_owners)
    buckets = tuple(Bucket(i, owner, tuple(part)) for i, (part, owner) in enumerate(zip(parts, owners, strict=True)))
    return SyncPlan(buckets, dtype, limit_bytes)


def _cut(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[Entry]]:
    parts: list[list[Entry]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = prod(shape) * itemsize
        if parts[-1] and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(Entry(name, tuple(shape), used, size))
        used += size
    return parts


def _deal(sizes: list[int], num_owners: int) -> list[int]:
    """Owner of every bucket: the last one is rank 0's, then the largest first to whoever has fewest bytes."""
    loads = [0] * num_owners
    owners = [0] * len(sizes)
    loads[0] = sizes[-1]
    for index in sorted(range(len(sizes) - 1), key=lambda i: (-sizes[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners
