"""What every way of sending weights offers to the publisher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from spear_megatron.weights.plan import Bucket
from spear_megatron.weights.servers import Target


class Way(Protocol):
    """One leader's side of a way. A server's failure is kept in the server group; other errors are raised.

    ``needs_session``: whether servers must open a session of updates.
    """

    needs_session: bool

    @property
    def published_folder(self) -> str | None:
        """Where the last update is as a Hugging Face folder that servers can read, if it is anywhere."""
        ...

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Host memory that a bucket is gathered into where there is no GPU, uint8 [num_bytes]."""
        ...

    def begin(self, targets: Sequence[Target], version: int) -> None:
        """Before the first bucket; every leader calls it, in an order that all agree on, one after the other."""
        ...

    def send(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Send one bucket to every target that has not failed. Not the main thread's."""
        ...

    def send_closing(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Send the bucket that completes the update, when all others have arrived; names the version. Rank 0 only."""
        ...

    def abandon(self) -> None:
        """After a failure: free what servers may be waiting for."""
        ...

    def close(self) -> None:
        """Release everything, at the end of the run."""
        ...
