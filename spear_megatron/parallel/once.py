"""Saying something once, though every rank of a job has it to say."""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta

_CONNECT_S = 5.0


def is_first_to_say(text: str) -> bool:
    """Whether no other rank of this job asked with the same ``text`` before.

    Ranks started by ``torchrun`` ask the store that it hosts, which needs no process groups and outlives a failing
    rank. True without such a store, so that nothing stays unsaid.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"spear_megatron/said/{attempt}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        store = TCPStore(address, port, None, False, timedelta(seconds=_CONNECT_S), wait_for_workers=False)
        return bool(store.add(key, 1) == 1)
    except RuntimeError:  # the store is gone
        return True
