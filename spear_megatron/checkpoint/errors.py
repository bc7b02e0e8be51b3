"""Errors of checkpointing."""

from __future__ import annotations

from spear_megatron.parallel.errors import RunError


class CheckpointError(RunError):
    """A checkpoint could not be written, or none of those present can be used. Says which, why, and what to do.

    The same error is raised on every rank.
    """


class DamagedCheckpoint(ValueError):
    """One checkpoint is not usable; the message names the file or state that is wrong."""
