"""Work that the leaders of a job share: who draws what next, and how many groups are complete, counted on the store."""

from __future__ import annotations

import torch.distributed as dist


class SharedWork:
    """Two counters of one collection. Leaders that are faster draw more; any thread may call every method."""

    def __init__(self, store: dist.Store, key: str) -> None:
        """``key`` names the collection and must not be in use."""
        self._store = store
        self._next, self._complete = f"{key}/next", f"{key}/complete"

    def draw(self) -> int:
        """The next number: 0, 1, 2, ... over all leaders, each handed out once."""
        return int(self._store.add(self._next, 1)) - 1

    def complete(self) -> int:
        """Count one more complete group; the new number over all leaders."""
        return int(self._store.add(self._complete, 1))

    @property
    def num_complete(self) -> int:
        """Complete groups of all leaders so far."""
        return int(self._store.add(self._complete, 0))

    def forget(self) -> None:
        """Remove the counters. One rank does it, once no leader uses them any more."""
        for key in (self._next, self._complete):
            self._store.add(key, 0)  # a key that was never counted cannot be deleted
            self._store.delete_key(key)
