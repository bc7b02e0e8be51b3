"""Memory of the node that needs most of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from spear_megatron.plan.engine import kv_bytes_per_token
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.machine import GIB
from spear_megatron.plan.meta import RankModel
from spear_megatron.plan.publish import SaveStaging
from spear_megatron.plan.run import PlannedRun
from spear_megatron.plan.terms import FP32, Term

PROCESS_GIB = {"cuda": 3, "cpu": 1}
TOKEN_BYTES = 64
"""A sampled token on its leader: ids, mask and log-probs in the trajectory (17 bytes) and again in its row (25), and
text of the conversation."""
ModelOfRank = Callable[[int], RankModel]


@dataclass(frozen=True, slots=True)
class Processes:
    """Interpreter and libraries of one process per rank: 3 GiB each with CUDA, 1 GiB without; an assumption."""

    ranks: int
    device: str
    label: ClassVar[str] = "processes"

    @property
    def nbytes(self) -> int:
        return self.ranks * PROCESS_GIB[self.device] * GIB


@dataclass(frozen=True, slots=True)
class ReferenceWeights:
    """The reference policy on the host, and the rank's own weights while it is swapped in: twice the parameters."""

    parameter_bytes: int
    label: ClassVar[str] = "reference weights"

    @property
    def nbytes(self) -> int:
        return 2 * self.parameter_bytes


@dataclass(frozen=True, slots=True)
class CheckpointStaging:
    """Sum of ``SaveStaging`` over the node's ranks."""

    stages: tuple[SaveStaging, ...]
    label: ClassVar[str] = "checkpoint staging"

    @property
    def nbytes(self) -> int:
        return sum(stage.nbytes for stage in self.stages)


@dataclass(frozen=True, slots=True)
class ReplayShards:
    """Replay buffer on this node's leaders: 17 bytes per token and 600 per trajectory (``replay.payload``), at most the
    bound of the buffer, evenly over the leaders; each rank also keeps the index, which is small.
    """

    total_bytes: int
    leaders_here: int
    leaders: int
    label: ClassVar[str] = "replay buffer"

    @property
    def nbytes(self) -> int:
        return self.total_bytes * self.leaders_here // self.leaders


@dataclass(frozen=True, slots=True)
class Trajectories:
    """A step's trajectories and rows on this node's leaders, 64 bytes per token."""

    tokens: int
    leaders_here: int
    leaders: int
    label: ClassVar[str] = "trajectories"

    @property
    def nbytes(self) -> int:
        return self.tokens * TOKEN_BYTES * self.leaders_here // self.leaders


@dataclass(frozen=True, slots=True)
class PublishedTensor:
    """The largest full tensor on each leader on its way to the engine, twice (received and handed on)."""

    largest_bytes: int
    leaders_here: int
    label: ClassVar[str] = "weight sync"

    @property
    def nbytes(self) -> int:
        return 2 * self.largest_bytes * self.leaders_here


@dataclass(frozen=True, slots=True)
class EmbeddedEngines:
    """Embedded engines of this node's leaders, float32: 4 N and the cache of all its requests at full length."""

    run: PlannedRun
    leaders_here: int
    label: ClassVar[str] = "embedded engines"

    @property
    def nbytes(self) -> int:
        """Bytes, by the formula of the class."""
        shape = self.run.shape
        cache = self.run.engine.max_num_seqs * self.run.max_tokens * kv_bytes_per_token(shape, 1, FP32)
        return self.leaders_here * (FP32 * shape.num_parameters() + cache)


def host_terms(run: PlannedRun, layout: Layout, node: int, ranks_per_node: int, model_of: ModelOfRank) -> list[Term]:
    """Terms of one node.

    Args:
        node: holds ranks ``node * ranks_per_node`` and following.
        model_of: a model like that of a rank, with buffers (ranks that differ only in numbers may share one).
    """
    ranks = range(node * ranks_per_node, min((node + 1) * ranks_per_node, layout.world_size))
    models = [model_of(rank) for rank in ranks]
    leaders_here = sum(model.tp_rank == model.cp_rank == model.pp_rank == 0 for model in models)
    shape = run.shape
    terms: list[Term] = [
        Processes(len(ranks), "cpu" if run.on_host else "cuda"),
        ReplayShards(run.replay_bytes, leaders_here, layout.dp),
        Trajectories(run.tokens, leaders_here, layout.dp),
        PublishedTensor(max(map(prod, shape.parameter_shapes().values())) * run.dtype.itemsize, leaders_here),
    ]
    if not run.on_host:  # there it is counted as a phase of the ranks
        terms.append(CheckpointStaging(tuple(SaveStaging(model, layout, on_host=False) for model in models)))
    if run.reference:
        weights = sum(info.nbytes for model in models for info in model.parameters.values())
        terms.append(ReferenceWeights(weights))
    if run.engine.kind == "embedded":
        terms.append(EmbeddedEngines(run, leaders_here))
    return [term for term in terms if term.nbytes]
