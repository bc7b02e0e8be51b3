"""Replay buffers of several data-parallel ranks as threads of one process, and made-up trajectories for them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear_megatron.data.exchange import TensorRecord
from spear_megatron.data.files import FileSystem
from spear_megatron.parallel import agreement
from spear_megatron.replay import buffer as buffer_module
from spear_megatron.replay import storage
from spear_megatron.replay.buffer import ReplayBuffer
from spear_megatron.replay.decisions import ReplayRules
from spear_megatron.replay.entries import ReplayEntry
from spear_megatron.replay.payload import BYTES_PER_TOKEN, make_payload
from spear_megatron.types import RewardParts, Segment, StopReason, Trajectory, TrajectoryId

SEED = 11
_POOL = ThreadPoolExecutor(4)


class Ranks:
    """One buffer per data-parallel rank; every method that is collective runs on all of them at once."""

    def __init__(
        self, size: int, run_dir: Path, rules: ReplayRules, *, baseline_size: int, temperature: float = 1.0
    ) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._slots: list[Any] = [None] * size
        self.buffers = []
        for rank in range(size):
            parallel: Any = SimpleNamespace(
                rank=rank, world_size=size, is_leader=True, dp_rank=rank, dp_size=size, ranks=self
            )
            self.buffers.append(
                ReplayBuffer(
                    rules, parallel, run_dir, baseline_size=baseline_size, seed=SEED, temperature=temperature,
                    files=Unsynced(),
                )  # fmt: skip
            )

    def each(self, action: Callable[[ReplayBuffer, int], Any]) -> list[Any]:
        """Results of ``action(buffer, rank)``, the ranks running side by side."""
        if self.size == 1:
            return [action(self.buffers[0], 0)]
        return [part.result() for part in [_POOL.submit(action, item, rank) for rank, item in enumerate(self.buffers)]]

    def gather(self, rank: int, value: Any) -> list[Any]:
        """What ``gather_objects`` does."""
        self._slots[rank] = value
        self._barrier.wait(20)
        values = list(self._slots)
        self._barrier.wait(20)
        return values

    def close(self) -> None:
        """End the processes that the buffers stand for."""
        for item in self.buffers:
            item.close()


class Unsynced(FileSystem):
    """Nothing here survives a power cut, and nothing waits for a disk."""

    def sync_folder(self, path: Path) -> None:
        pass


@contextmanager
def simulated_ranks() -> Iterator[None]:
    """Let buffers talk through their ``Ranks`` instead of torch.distributed."""

    def gather(parallel: Any, value: Any) -> list[Any]:
        return parallel.ranks.gather(parallel.rank, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer_module, "gather_objects", gather)
        patch.setattr(agreement, "gather_objects", gather)
        patch.setattr(storage.os, "fsync", lambda handle: None)
        yield


def payload_of(key: TrajectoryId, tokens: int, temperature: float = 1.0) -> TensorRecord:
    """The payload of a trajectory of ``tokens`` tokens, in one or two segments, a function of its arguments."""
    lengths = [tokens] if tokens < 4 else [tokens - 2, 2]
    base = 1000 * key.step + 100 * key.task + key.sample
    segments = [
        Segment(
            torch.arange(base + 7 * part, base + 7 * part + length, dtype=torch.int32),
            torch.arange(length) > 0,
            -torch.arange(length).float() / (base + 1),
        )
        for part, length in enumerate(lengths)
    ]
    trajectory = Trajectory(key, tuple(segments), RewardParts(1.0), StopReason.ANSWER, 0)
    old = [segment.rollout_log_probs - 0.25 for segment in segments]
    return make_payload(trajectory, old, [0.5] * len(segments), temperature)


def made_up(step: int, draw: random.Random, temperature: float = 1.0) -> tuple[list[ReplayEntry], list[Any]]:
    """Candidates of a step, with shard 0, and (bases, bonuses) of its groups."""
    entries, groups = [], []
    for task in range(draw.randrange(4)):
        members: Sequence[tuple[float, float]] = [
            (draw.choice([-1.0, 0.0, 1.0]), draw.randrange(5) / 10) for _ in range(draw.randrange(1, 5))
        ]
        groups.append(([base for base, _ in members], [bonus for _, bonus in members]))
        for sample, (base, bonus) in enumerate(members):
            tokens = draw.randrange(1, 9)
            parts = RewardParts(base, success=base > 0, num_tool_turns=draw.randrange(2))
            entries.append(
                ReplayEntry(
                    id=TrajectoryId(step, task, sample), shard=0, base=base, bonus=bonus, parts=parts,
                    stored_reward=base + draw.random() * bonus, advantage=draw.uniform(-0.5, 1), num_tokens=tokens,
                    num_sampled=tokens, num_bytes=BYTES_PER_TOKEN * tokens, temperature=temperature,
                )  # fmt: skip
            )
    return entries, groups
