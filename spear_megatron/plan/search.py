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


@dataclass(frozen=True, slots=True)
class Proposals:
    """Assessments that fit, fastest first, and how many layouts were looked at."""

    ranked: tuple[Assessment, ...]
    considered: int


def propose(run: PlannedRun, machine: Machine, world_size: int, *, keep: int = 5) -> Proposals:
    """The ``keep`` fastest layouts of ``world_size`` ranks that fit, with micro-batches of one and of two longest rows.

    Context parallelism is always 1: the trainer supports nothing else. Tensor parallelism stays within a node. Every
    layout of a rank count is tried without and with full recomputation, one layer at a time.
    """
    fitting: list[Assessment] = []
    considered = 0
    for layout in layouts(run.shape, world_size, machine.gpus_per_node):
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


def layouts(shape: ModelShape, world_size: int, ranks_per_node: int) -> Iterator[Layout]:
    """Every layout that the model and the rank count allow, sequence parallel where tensors are cut."""
    for tp in _divisors(world_size, ranks_per_node):
        for pp in _divisors(world_size // tp, _MOST_STAGES):
            for vpp in _VIRTUAL if pp > 1 else (None,):
                plain = MegatronConfig(
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=vpp,
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


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]


def _micro_batches(run: PlannedRun, layout: Layout) -> list[int]:
    """The longest row, and two of them, each rounded up to a multiple of the tensor size."""
    return [times * run.max_tokens + -(times * run.max_tokens) % layout.tp for times in (1, 2)]


def _least_bytes(run: PlannedRun, layout: Layout) -> float:
    """Weights, gradients and optimizer of an average rank: no layout needs less."""
    per_rank = run.shape.num_parameters() / layout.megatron.model_parallel_size
    state = 8 + (4 if run.dtype.itemsize < 4 else 0)
    return per_rank * (run.dtype.itemsize + 4 + state / layout.dp)
