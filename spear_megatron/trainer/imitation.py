"""Self-imitation inside the training step: choose from the buffer, bring rows to their ranks, push the step's successes.

The buffer decides by its index, which every rank holds; payloads live on the leaders that produced them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spear_megatron.algorithms.recalibration import GroupStatistics
from spear_megatron.algorithms.schedules import replay_coefficient
from spear_megatron.data.files import FileEntry
from spear_megatron.data.exchange import TensorRecord, exchange
from spear_megatron.data.packing import row_key
from spear_megatron.observability.lineage import StepLineage
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState
from spear_megatron.replay.buffer import ReplayBuffer
from spear_megatron.replay.decisions import ReplaySelection
from spear_megatron.replay.payload import make_payload, replay_rows
from spear_megatron.rollout.collect import Collected
from spear_megatron.trainer.config import ActorConfig
from spear_megatron.trainer.objective import merge_used
from spear_megatron.trainer.scoring import Scores
from spear_megatron.types import Row, TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What is replayed in one step.

    Attributes:
        gamma: coefficient of the self-imitation term.
        tokens, advantages: tokens and recalibrated advantage of every chosen trajectory.
    """

    gamma: float = 0.0
    tokens: Mapping[TrajectoryId, int] = field(default_factory=dict)
    advantages: Mapping[TrajectoryId, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    selection: ReplaySelection | None = None


NOTHING_REPLAYED = Replayed()
