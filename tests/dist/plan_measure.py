"""One rank's live tensor bytes in every phase of a training step, and what the planner says about them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spear_megatron.types import Row, TrajectoryId


@dataclass(frozen=True)
class Case:
    """A model in a layout; ``rows`` rows of ``length`` tokens on every data-parallel rank, ``per_batch`` to a
    micro-batch."""

    name: str
    world_size: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    recompute: bool | str = False
    bf16: bool = False
    length: int = 129
    rows: int = 8
    per_batch: int = 2
    max_logits_mb: int = 2048
    cp: int = 1


def make_rows(case: Case, dp_rank: int, vocab: int) -> list[Row]:
    generator = torch.Generator().manual_seed(dp_rank)
    prompt = case.length // 4
    mask = torch.arange(case.length) >= prompt
    return [
        Row(
            trajectory=TrajectoryId(1 + dp_rank, index // 4, index % 4),
            segment=0,
            ids=torch.randint(0, vocab, (case.length,), generator=generator, dtype=torch.int32),
            response_mask=mask.clone(),
            rollout_log_probs=-torch.rand(case.length, generator=generator) * mask,
            advantages=torch.randn(1, generator=generator) * mask.float(),
        )
        for index in range(case.rows)
    ]


def measure_process_on_rank(folder: str, case: Case) -> dict[str, int]:
    """Peak resident bytes of the process above its baseline, by phase."""
    from spear_megatron.plan.measure import ProcessBytes

    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # libraries that are loaded with their first use
    return measure_on_rank(folder, case, ProcessBytes)


def measure_on_rank(folder: str, case: Case, meter_class: Any = None) -> dict[str, int]:
    """Peak live bytes by phase, after a first step that allocates the optimizer's state."""
    from train_step import Layout, build_actor

    from spear_megatron.checkpoint.sharded import plan_save
    from spear_megatron.model.hf_io import iter_hf_tensors
    from spear_megatron.plan.measure import LiveBytes

    layout = Layout(
        case.name, case.world_size, case.tp, case.pp, case.vpp, case.sequence_parallel, case.distributed_optimizer,
        max_tokens=(case.length - 1) * case.per_batch, recompute=case.recompute, cp=case.cp,
    )  # fmt: skip
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    found: dict[str, int] = {}
    with (meter_class or LiveBytes)() as meter:
        actor, shape, parallel = build_actor(folder, layout, dtype=dtype, max_logits_mb=case.max_logits_mb)
        rows = make_rows(case, parallel.dp_rank, shape.vocab_size)
        base = sum(t.untyped_storage().nbytes() for row in rows for t in _tensors(row))
        rows, _ = actor.log_probs(rows)
        base += sum(row.old_log_probs.untyped_storage().nbytes() for row in rows)
        actor.update(rows)

        def phase(name: str, run: Any) -> Any:
            meter.reset_peak()
            result = run()
            found[name] = meter.peak - base
            return result

        phase("rollout", lambda: None)
        phase("old_log_prob", lambda: actor.log_probs(rows)[1])
        _, figures, norm = phase("update", lambda: actor.policy_gradients(rows))
        phase("step", lambda: actor._apply(figures, norm))
        phase("publish", lambda: [None for _ in iter_hf_tensors(actor.chunks, shape, parallel)] and None)

        def save() -> None:
            plan = plan_save(parallel, actor.chunks, actor.optimizer.megatron, snapshot=False)
            from spear_megatron.data.files import FileSystem

            with tempfile.TemporaryDirectory() as target:
                (Path(target) / "sharded").mkdir()
                plan.write(FileSystem(), Path(target) / "sharded")

        phase("save", save)
    return found


def _tensors(row: Row) -> list[torch.Tensor]:
    return [row.ids, row.response_mask, row.rollout_log_probs, row.advantages]


def predict(folder: str, case: Case, rank: int, *, process: bool = False) -> dict[str, list[tuple[str, int]]]:
    """(label, bytes) of the planner's terms by phase."""
    from train_step import RECOMPUTE

    from spear_megatron.model.shape import ModelShape
    from spear_megatron.parallel.config import MegatronConfig
    from spear_megatron.parallel.context import context_positions
    from spear_megatron.plan.layout import Layout
    from spear_megatron.plan.meta import build_rank
    from spear_megatron.plan.rank import RankMemory
    from spear_megatron.plan.workload import Workload

    shape = ModelShape.from_folder(folder)
    layout = Layout(
        megatron=MegatronConfig(
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            virtual_pipeline_model_parallel_size=case.vpp,
            sequence_parallel=case.sequence_parallel,
            context_parallel_size=case.cp,
            use_distributed_optimizer=case.distributed_optimizer,
            **RECOMPUTE[case.recompute],
        ),
        world_size=case.world_size,
    )
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    micro_batches = case.rows // case.per_batch
    model = build_rank(shape, layout, rank, dtype=dtype, with_buffers=True)
    sampled = case.length - case.length // 4
    if case.cp > 1:
        own = context_positions([0, case.length - 1], model.cp_rank, case.cp)
        sampled = int((own + 1 >= case.length // 4).sum())
    memory = RankMemory(
        shape=shape,
        layout=layout,
        model=model,
        workload=Workload(
            tokens=(case.length - 1) * case.per_batch,
            micro_batches=micro_batches,
            forward_micro_batches=micro_batches,
            head_rows=sampled * case.per_batch,
            max_logits_bytes=case.max_logits_mb << 20,
            dtype=dtype,
            optimizer="single",
            on_host=True,
            packed=case.per_batch > 1,
            sequence_tokens=case.length - 1,
        ),
    )
    phases = memory.phases(process=process)
    return {name: [(term.label, term.nbytes) for term in terms] for name, terms in phases.items()}
