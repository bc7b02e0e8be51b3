"""An endless, resumable order over the rows of a data set."""

from __future__ import annotations

from typing import Any

import torch

from spear_megatron.parallel.seeds import generator


class EpochOrder:
    """Indices of ``size`` rows, epoch after epoch; each epoch is a permutation keyed by (seed, purpose, epoch)."""

    def __init__(self, size: int, *, seed: int, purpose: str, shuffle: bool) -> None:
        if size < 1:
            raise ValueError(f"the data set of {purpose!r} is empty: add rows to its files")
        self.size = size
        self.position = 0
        self._seed = seed
        self._purpose = purpose
        self._shuffle = shuffle
        self._epoch = -1
        self._permutation: list[int] = []

    def take(self, count: int) -> list[int]:
        """The next ``count`` row indices; a take may run over the end of an epoch."""
        indices = [self.at(self.position + offset) for offset in range(count)]
        self.position += count
        return indices

    def at(self, position: int) -> int:
        """The row index at a position of the endless order."""
        epoch, offset = divmod(position, self.size)
        if not self._shuffle:
            return offset
        if epoch != self._epoch:
            keyed = generator(self._seed, f"order/{self._purpose}", epoch)
            self._permutation = torch.randperm(self.size, generator=keyed).tolist()
            self._epoch = epoch
        return self._permutation[offset]

    def state_dict(self) -> dict[str, Any]:
        """Position, and what must not change under it: size, seed, shuffle."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: the data, the seed or the shuffling differ from those of the state.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(
                    f"cannot resume the order of {self._purpose!r}: {key} was {state.get(key)!r} and is {value!r} now; "
                    "resume with the data files and data.* keys of the original run"
                )
        self.position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self._seed, "shuffle": self._shuffle}
