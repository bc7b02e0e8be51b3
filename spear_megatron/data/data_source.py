"""Batches of a corpus in one order that nothing but seed and corpus decides, whoever reads them and on how many shards.

The order is endless: a new keyed permutation of all samples every epoch. Batch k is the positions
[k * batch_size, (k + 1) * batch_size) of it, and may run over the end of an epoch; all shards take the same batch at
the same time and share it out by the tokens that training needs. So one number, the position, is the whole state, and
continuing on another number of shards, or with another batch size, covers every sample exactly once.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from spear_megatron.data.balance import assign
from spear_megatron.data.corpus import LENGTH, PACKED, Corpus
from spear_megatron.data.order import EpochOrder
from spear_megatron.data.sft import SftExample

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """A sample in the order: its ``position`` in the endless order, and the index of the ``sample`` in the corpus."""

    position: int
    sample: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One shard's share of a batch, padded with zeros at the end of every row; it may be empty.

    Attributes:
        places: what the rows are, ascending by position.
        ids: int32 [rows, longest]. loss_mask: bool [rows, longest]. lengths: int64 [rows], on the CPU.
    """

    places: tuple[Place, ...]
    ids: torch.Tensor
    loss_mask: torch.Tensor
    lengths: torch.Tensor

    def examples(self) -> list[SftExample]:
        """The rows without their padding, in the memory of the batch."""
        rows = enumerate(self.lengths.tolist())
        return [SftExample(self.ids[row, :length], self.loss_mask[row, :length]) for row, length in rows]


class DataSource(Protocol):
    """An endless, resumable stream of one shard's batches."""

    @property
    def position(self) -> int:
        """Samples that all shards together have taken: the position of the next batch."""

    @property
    def epoch(self) -> int:
        """0-based epoch of the next batch's first sample."""

    def next_batch(self) -> Batch:
        """This shard's share of the next batch.

        Raises:
            ValueError: stored samples are not what was written; names the file.
        """

    def state_dict(self) -> dict[str, Any]:
        """Position, the identity of order and content, and how it was read; equal on all shards."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, on any number of shards and with any batch size.

        Raises:
            ValueError: corpus, seed or shuffling are others, or the state is no state of a source.
        """

    def close(self) -> None:
        """Let go of threads and files."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a corpus is read: ``batch_size`` samples over all shards, of which this is ``shard_id``.

    Raises:
        ValueError: a number is out of range.
    """

    batch_size: int
    seed: int
    shard_id: int = 0
    num_shards: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"a batch needs at least one sample, got {self.batch_size}")
        if not 0 <= self.shard_id < self.num_shards:
            raise ValueError(f"shard {self.shard_id} of {self.num_shards} does not exist: count from 0")


class OrderedSource(ABC):
    """Order, sharing out and state; what remains is to fetch named samples, see :class:`DataSource`."""

    def __init__(self, corpus: Corpus, reading: Reading) -> None:
        self.corpus, self.reading = corpus, reading
        self._order = EpochOrder(len(corpus.table), seed=reading.seed, purpose="sft", shuffle=reading.shuffle)
        self._position = 0

    @property
    def position(self) -> int:
        """Samples that all shards together have taken."""
        return self._position

    @property
    def epoch(self) -> int:
        """0-based epoch of the next batch's first sample."""
        return self._position // self._order.size

    def next_batch(self) -> Batch:
        """This shard's share of the next batch; ValueError, naming the file, for damaged samples."""
        batch = self._fetch(self._position)
        self._position += self.reading.batch_size
        return batch

    def share(self, position: int) -> list[Place]:
        """This shard's samples of the batch that begins at ``position``, ascending."""
        reading = self.reading
        places = [Place(p, self._order.at(p)) for p in range(position, position + reading.batch_size)]
        if reading.num_shards == 1:
            return places
        costs = self.corpus.table[[place.sample for place in places], PACKED].tolist()
        owners = assign(costs, [0] * len(costs), reading.num_shards)
        return [place for place, owner in zip(places, owners, strict=True) if owner == reading.shard_id]

    def state_dict(self) -> dict[str, Any]:
        """Position, the identity of order and content, and how it was read; equal on all shards."""
        reading = self.reading
        layout = {"batch_size": reading.batch_size, "num_shards": reading.num_shards}
        return {"position": self._position, **layout, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; ValueError if corpus, seed or shuffling are others."""
        missing = {"position", "batch_size", "num_shards", *self._identity()} - set(state)
        if missing:
            raise ValueError(f"this is no state of a data source: it lacks {', '.join(sorted(missing))}")
        if not isinstance(state["position"], int) or state["position"] < 0:
            raise ValueError(f"the state of a data source has the position {state['position']!r}: it counts samples")
        for key, value in self._identity().items():
            if state[key] != value:
                files = "; its files were changed since, or they are others" if key in ("corpus", "size") else ""
                raise ValueError(
                    f"cannot resume on {self.corpus.name}: {key} was {state[key]!r} and is {value!r} now{files}; "
                    "resume with the corpus and the data.* keys of the original run"
                )
        for key, value in (("num_shards", self.reading.num_shards), ("batch_size", self.reading.batch_size)):
            if state[key] != value:
                logger.info("the data order continues at sample %d with %s %s instead of %s", state["position"], key,
                            value, state[key])  # fmt: skip
        self._position = state["position"]
        self._moved()

    def close(self) -> None:
        """Nothing is held open by default."""
        self._moved()

    @abstractmethod
    def _fetch(self, position: int) -> Batch:
        """The share of the batch that begins at ``position``."""

    def _moved(self) -> None:
        """The position was set: whatever was read ahead is of no use."""

    def _identity(self) -> dict[str, Any]:
        order = self._order.state_dict()
        return {**{key: order[key] for key in ("size", "seed", "shuffle")}, "corpus": self.corpus.identity()}


class MappedSource(OrderedSource):
    """Reads samples from mapped files (or memory) when they are asked for, in the calling thread."""

    def _fetch(self, position: int) -> Batch:
        places = self.share(position)
        lengths = self.corpus.table[[place.sample for place in places], LENGTH]
        shape = (len(places), int(lengths.max(initial=0)))
        ids, loss_mask = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.uint8)
        for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
            ids[row, :length], loss_mask[row, :length] = self.corpus.read(place.sample)
        return make_batch(places, torch.from_numpy(ids), torch.from_numpy(loss_mask), lengths)


def make_batch(places: Sequence[Place], ids: torch.Tensor, loss_mask: torch.Tensor, lengths: Any) -> Batch:
    """A batch of padded components: ids int32 and mask uint8, both [rows, longest]."""
    return Batch(tuple(places), ids, loss_mask.bool(), torch.as_tensor(np.asarray(lengths, dtype=np.int64)))
