"""Stored trajectories as examples to imitate: what a checkpoint's replay buffer holds, read from its segment files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from spear_megatron.data.exchange import decode_records
from spear_megatron.data.sft import SftExample
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.replay.storage import Place, read_record
from spear_megatron.types import TrajectoryId


def stored_examples(
    state: Mapping[str, Any], run_dir: Path, *, min_reward: float | None = None, max_length: int | None = None
) -> Iterator[SftExample]:
    """One example per segment of every stored trajectory, in id order; the policy's own tokens are to be learned.

    Args:
        state: of :meth:`spear_megatron.replay.buffer.ReplayBuffer.snapshot`.
        run_dir: run directory that its segment files lie in.
        min_reward: trajectories of a smaller total reward are left out.
        max_length: trajectories with a longer segment, in tokens, are left out.

    Raises:
        DamagedSegment: a segment file is missing or damaged.
    """
    rows = sorted(state["entries"], key=lambda row: TrajectoryId(*row["id"]))
    for row in rows:
        entry = ReplayEntry.decode({key: value for key, value in row.items() if key != "place"})
        if min_reward is not None and entry.stored_reward < min_reward:
            continue
        if max_length is not None and entry.longest > max_length:
            continue
        data = read_record(run_dir, Place(**row["place"]), entry.id)
        (record,) = decode_records(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        lengths = record.fields["lengths"]
        parts = (record.tensors[name].split(lengths) for name in ("ids", "response_mask"))
        for ids, mask in zip(*parts, strict=True):
            if mask.any():
                yield SftExample(ids, mask)
