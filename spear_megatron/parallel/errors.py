"""Failures that a user can understand without a traceback."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class RunError(RuntimeError):
    """A command cannot go on for a reason that the message explains; it is printed as one line."""


class RunTimeout(RunError, TimeoutError):
    """A wait passed its deadline; the message names phase, rank and what was waited for.

    ``topic``: what ranks that give up together have in common; one of them says it for all.
    """

    topic = "a wait passed its deadline"


@contextlib.contextmanager
def named_waits(where: str) -> Iterator[None]:
    """Tell ``where`` (rank, phase) a collective inside the body gave up waiting for other ranks.

    Raises:
        RunTimeout: the deadline of a collective passed.
    """
    try:
        yield
    except RuntimeError as error:
        if "Timed out waiting" in str(error):  # gloo; NCCL's watchdog ends the process and names the collective
            reason = re.sub(r"\[\S+\.cc:\d+\]\s*", "", str(error).splitlines()[0])
            raise RunTimeout(f"{where}: other ranks did not answer in time ({reason})") from error
        raise


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended: that rank says why, this one has nothing to add."""
    signs = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
