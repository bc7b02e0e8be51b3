"""Proposes layouts: every valid one is assessed, those that fit are ranked by the estimated time of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from spear_megatron.model.shape import ModelShape
from spear_megatron.model.transformer_config import check_layout
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.plan.assess import Assessment, assess
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.machine import Machine
from spear_megatron.plan.run import PlannedRun

_VIRTUAL = (None, 2, 4)
_MOST_STAGES = 16
_LEAST_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Proposals:
    """Assessments that fit, fastest first, and how many layouts were looked at."""

    ranked: tuple[Assessment, ...]
    considered: int


def propose(run: PlannedRun, machine: Machine, world_size: int, *, keep: int = 5) -> Proposals:
    """The ``keep`` fastest layouts of ``world_size`` ranks that fit, with micro-batches of one and of two longest rows.

    Tensor parallelism stays within a node; context parallelism is tried as far as it leaves chunks of at least 1,024
    tokens of the longest row. Every layout of a rank count is tried without and with full recomputation, one layer at a
    time.
    """
    fitting: list[Assessment] = []
    considered = 0
    for layout in layouts(run.shape, world_size, machine.gpus_per_node, run.max_tokens):
        if _least_bytes(run, layout) > machine.gpu_bytes and not run.on_host:
            considered += 1
            continue
        for tokens in _micro_batches(run, layout):
            considered += 1
            found = assess(replace(run, micro_batch_tokens=tokens), layout, machine)
            if found.fits:
                fitting.append(found)
    fitting.sort(key=lambda item: (item.time.total, item.peak))
    return Proposals(tuple(fitting[:keep]), considered)


def layouts(shape: ModelShape, world_size: int, ranks_per_node: int, longest: int = 0) -> Iterator[Layout]:
    """Every layout that the model and the rank count allow, sequence parallel where tensors are cut.

    Args:
        longest: tokens of the longest row, which decides how far sequences are cut; 0 cuts none.
    """
    for tp in _divisors(world_size, ranks_per_node):
        for pp in _divisors(world_size // tp, _MOST_STAGES):
            for cp in _context_sizes(world_size // (tp * pp), longest):
                for vpp in _VIRTUAL if pp > 1 else (None,):
                    plain = MegatronConfig(
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        virtual_pipeline_model_parallel_size=vpp,
                        context_parallel_size=cp,
                        sequence_parallel=tp > 1,
                    )
                    try:
                        check_layout(shape, plain)
                    except ValueError:
                        continue
                    yield Layout(megatron=plain, world_size=world_size)
                    full = replace(
                        plain, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
                    )
                    yield Layout(megatron=full, world_size=world_size)


def _context_sizes(ranks: int, longest: int) -> list[int]:
    """1, and the powers of two up to 8 that divide the ranks and leave chunks that are worth a message."""
    return [cp for cp in (1, 2, 4, 8) if ranks % cp == 0 and (cp == 1 or longest >= 2 * cp * _LEAST_CHUNK)]


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]


def _micro_batches(run: PlannedRun, layout: Layout) -> list[int]:
    """The longest row, and two of them, each rounded up to what a micro-batch is padded to."""
    multiple = layout.megatron.token_multiple
    return [times * run.max_tokens + -(times * run.max_tokens) % multiple for times in (1, 2)]


def _least_bytes(run: PlannedRun, layout: Layout) -> float:
    """Weights, gradients and optimizer of an average rank: no layout needs less."""
    per_rank = run.shape.num_parameters() / (layout.tp * layout.pp)
    state = 8 + (4 if run.dtype.itemsize < 4 else 0)
    return per_rank * (run.dtype.itemsize + 4 + state / layout.shards)
