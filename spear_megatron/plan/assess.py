"""Everything about one layout: memory of every kind of rank and of the fullest node, what does not fit, step time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from spear_megatron.model.shape import ModelShape
from spear_megatron.plan.engine import EngineWeights, KVCache, cache_that_fits
from spear_megatron.plan.host import host_terms
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.machine import GIB, Machine
from spear_megatron.plan.meta import RankModel, build_rank
from spear_megatron.plan.rank import RankMemory, total
from spear_megatron.plan.run import PlannedRun
from spear_megatron.plan.terms import Reserve, Term
from spear_megatron.plan.timing import StepTime, estimate

_REMEDIES = {
    "parameters": "more tensor_model_parallel_size or pipeline_model_parallel_size",
    "main gradients": "more tensor_model_parallel_size or pipeline_model_parallel_size",
    "optimizer state": "use_distributed_optimizer=true with more data-parallel ranks, or more pipeline stages",
    "optimizer workspace": "Transformer Engine's fused Adam, or more data-parallel ranks",
    "activations": "recompute_granularity=full, sequence_parallel=true or a smaller ppo_max_token_len_per_gpu",
    "recomputed layers": "recompute_num_layers=1 or a smaller ppo_max_token_len_per_gpu",
    "log-prob workspace": "a smaller actor.max_logits_mb",
    "backward workspace": "more tensor_model_parallel_size",
    "forward workspace": "more tensor_model_parallel_size or a smaller ppo_max_token_len_per_gpu",
    "batch": "more data-parallel ranks or a smaller ppo_mini_batch_size",
    "engine weights": "more --engine-tp, or --engine separate",
    "KV cache": "more --engine-tp, or --engine separate",
    "replay buffer": "a smaller replay.max_gib",
    "checkpoint staging": "fewer ranks per node, or more host memory",
}


@dataclass(frozen=True, slots=True)
class Shortage:
    """A place whose memory is too small.

    Attributes:
        where, phase: kind of rank (or ``host``) and phase. needed, available: bytes. term: label of what is to blame,
            the largest term, or the one that got too little.
    """

    where: str
    phase: str
    needed: int
    available: int
    term: str
    term_bytes: int

    def describe(self) -> str:
        """One sentence with the term's name and the remedy."""
        remedy = _REMEDIES.get(self.term, "more memory")
        return (
            f"{self.where}, {self.phase}: {self.needed / GIB:.1f} GiB of {self.available / GIB:.1f} GiB; the term that "
            f"does not fit is {self.term} ({self.term_bytes / GIB:.1f} GiB): try {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """A layout's plan.

    Attributes:
        kinds: name of a kind of rank -> phase -> terms. host: terms of the fullest node.
        cache_tokens: tokens that fit into the cache of one engine on GPUs (0 for embedded ones).
    """

    run: PlannedRun
    layout: Layout
    kinds: dict[str, dict[str, list[Term]]]
    host: list[Term]
    cache_tokens: int
    shortages: tuple[Shortage, ...]
    time: StepTime

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank in its fullest phase."""
        return max(total(terms) for phases in self.kinds.values() for terms in phases.values())


def rank_kinds(layout: Layout) -> dict[str, int]:
    """Name -> a rank of that kind: stages differ in layers and head, the leader gathers weights to publish."""
    last = layout.pp - 1
    leader = {"leader": layout.rank_of(tp_rank=0, dp_rank=0, pp_rank=0)}
    ends = {"tp_rank": layout.tp - 1, "dp_rank": layout.dp - 1, "cp_rank": layout.cp - 1}
    others: dict[str, int] = {}
    if layout.tp * layout.shards > 1:
        others["first stage" if layout.pp > 1 else "others"] = layout.rank_of(**ends, pp_rank=0)
    if layout.pp > 2:
        others["middle stage"] = layout.rank_of(**ends, pp_rank=1)
    if layout.pp > 1:
        others["last stage"] = layout.rank_of(tp_rank=0, dp_rank=0, pp_rank=last, cp_rank=layout.cp - 1)
    return leader | others


@lru_cache(maxsize=4096)
def _model(shape: ModelShape, layout: Layout, rank: int, run_dtype: object) -> RankModel:
    return build_rank(shape, layout, rank, dtype=run_dtype, with_buffers=True)  # type: ignore[arg-type]


def model_of(run: PlannedRun, layout: Layout, rank: int) -> RankModel:
    """A model like that of ``rank``: built once per stage, with the rank's own numbers."""
    tp_rank, cp_rank, dp_rank, pp_rank = layout.coordinates(rank)
    plain = replace(
        layout, megatron=replace(layout.megatron, recompute_granularity=None, recompute_method=None,
                                 recompute_num_layers=None)
    )  # fmt: skip
    alike = 0 if pp_rank == 0 else layout.pp - 1 if pp_rank == layout.pp - 1 else 1
    built = _model(run.shape, plain, plain.rank_of(tp_rank=0, dp_rank=0, pp_rank=alike), run.dtype)
    shard_rank = cp_rank + layout.cp * dp_rank
    return replace(
        built, tp_rank=tp_rank, dp_rank=dp_rank, pp_rank=pp_rank, cp_rank=cp_rank, shard_rank=shard_rank
    )


def assess(run: PlannedRun, layout: Layout, machine: Machine) -> Assessment:
    """Memory and time of ``run`` in ``layout`` on ``machine``.

    Raises:
        ValueError: the layout does not fit the model.
    """
    kinds: dict[str, dict[str, list[Term]]] = {}
    cache_tokens = 0
    for name, rank in rank_kinds(layout).items():
        memory = RankMemory(
            shape=run.shape, layout=layout, model=model_of(run, layout, rank), workload=run.workload(layout)
        )
        kinds[name] = _with_surroundings(memory, run, machine)
    if run.engine.on_gpus:
        if run.engine.kind == "separate":
            kinds["engine"] = {"rollout": _engine_alone(run, machine)}
        caches = [
            term for phases in kinds.values() for term in phases["rollout"] if isinstance(term, KVCache)
        ]
        cache_tokens = min(term.tokens for term in caches)
    host = _fullest_node(run, layout, machine)
    shortages = tuple(_shortages(run, kinds, host, machine, cache_tokens))
    return Assessment(
        run=run,
        layout=layout,
        kinds=kinds,
        host=host,
        cache_tokens=cache_tokens,
        shortages=shortages,
        time=estimate(run, layout, machine, cache_tokens),
    )


def _with_surroundings(memory: RankMemory, run: PlannedRun, machine: Machine) -> dict[str, list[Term]]:
    """Phases of a rank with reserve and colocated engine; the cache gets what is left, up to what is useful."""
    phases = memory.phases(process=run.on_host)
    churn = memory.activations.nbytes
    reserve = Reserve(0 if run.on_host else machine.reserve_bytes, machine.fragmentation, churn)
    steady = replace(reserve, activations=0)
    found = {name: [*terms, reserve if name == "update" else steady] for name, terms in phases.items()}
    if run.engine.kind == "none":
        del found["rollout"], found["publish"]
    if run.engine.kind == "colocated":
        weights = EngineWeights(run.shape, run.engine.tp)
        found["publish"].append(weights)
        found["rollout"].append(weights)
        cache = _cache(run, machine.gpu_bytes - total(found["rollout"]))
        found["rollout"].append(cache)
        if not run.engine.sleeps:
            for name in found.keys() - {"rollout", "publish"}:
                found[name] += [weights, cache]
            found["publish"].append(cache)
    return found


def _cache(run: PlannedRun, free: int) -> KVCache:
    return cache_that_fits(run.shape, run.engine.tp, free, run.engine.max_num_seqs * run.max_tokens)


def _engine_alone(run: PlannedRun, machine: Machine) -> list[Term]:
    weights = EngineWeights(run.shape, run.engine.tp)
    reserve = Reserve(machine.reserve_bytes, 0.0, 0)
    return [weights, reserve, _cache(run, machine.gpu_bytes - weights.nbytes - reserve.nbytes)]


def _fullest_node(run: PlannedRun, layout: Layout, machine: Machine) -> list[Term]:
    per_node = min(machine.gpus_per_node, layout.world_size)
    nodes = -(-layout.world_size // per_node)
    candidates = {0, nodes - 1} | {stage * layout.tp * layout.shards // per_node for stage in range(layout.pp)}
    every = [
        host_terms(run, layout, node, per_node, lambda rank: model_of(run, layout, rank)) for node in candidates
    ]
    return max(every, key=total)


def _shortages(
    run: PlannedRun, kinds: dict[str, dict[str, list[Term]]], host: list[Term], machine: Machine, cache_tokens: int
) -> Iterator[Shortage]:
    if not run.on_host:
        for kind, phases in kinds.items():
            for phase, terms in phases.items():
                needed = total(terms)
                if needed > machine.gpu_bytes:
                    largest = _to_blame(terms)
                    yield Shortage(kind, phase, needed, machine.gpu_bytes, largest.label, largest.nbytes)
        if run.engine.on_gpus and cache_tokens < run.max_tokens:
            wanted = KVCache(run.shape, run.engine.tp, run.max_tokens).nbytes
            have = KVCache(run.shape, run.engine.tp, cache_tokens).nbytes
            yield Shortage("engine cache for one longest request", "rollout", wanted, have, "KV cache", wanted)
    needed = total(host) + _device_side(run, kinds, machine)
    if needed > machine.host_bytes:
        largest = _to_blame(host)
        yield Shortage("host", "any phase", needed, machine.host_bytes, largest.label, largest.nbytes)


def _device_side(run: PlannedRun, kinds: dict[str, dict[str, list[Term]]], machine: Machine) -> int:
    """What ranks on the CPU take from their node."""
    if not run.on_host:
        return 0
    return machine.gpus_per_node * max(total(terms) for phases in kinds.values() for terms in phases.values())


def _to_blame(terms: list[Term]) -> Term:
    """The largest term that can be changed."""
    return max((term for term in terms if term.label != "reserve"), key=lambda term: term.nbytes)
