"""Supervised cold start on the same model, packing and optimizer path as reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass

from spear_megatron.data.balance import assign
from spear_megatron.data.packing import packed_length
from spear_megatron.data.rows import conversation_row
from spear_megatron.data.sft import SftSource
from spear_megatron.observability.record import Recorder
from spear_megatron.observability.timing import PhaseTimer
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import ParallelState
from spear_megatron.trainer.actor import Actor
from spear_megatron.types import Row


@dataclass(frozen=True, kw_only=True)
class SupervisedRun:
    """What the cold start needs. Every rank holds the whole source and trains on its share of each batch."""

    actor: Actor
    source: SftSource
    parallel: ParallelState
    recorder: Recorder
    batch_size: int
    total_steps: int


def train_supervised(run: SupervisedRun) -> float:
    """Masked cross-entropy for ``total_steps`` optimizer steps; returns the last step's loss in nats per token.

    Raises:
        RunError: loss or gradient was not finite.
    """
    timer = PhaseTimer()
    loss = float("nan")
    for step in range(1, run.total_steps + 1):
        first = (step - 1) * run.batch_size
        examples = run.source.take(run.batch_size)
        rows = [conversation_row(first + i, example.ids, example.loss_mask) for i, example in enumerate(examples)]
        with timer.phase("update_actor"):
            result = run.actor.sft_update(own_share(rows, run.parallel))
        if result.skipped is not None:
            raise RunError(f"supervised step {step} was skipped ({result.skipped}): lower sft.lr or check the data")
        loss = result.metrics["sft/loss"]
        run.recorder.write(step, {**result.metrics, **timer.take()})
    run.actor.settle()
    return loss


def own_share(rows: list[Row], parallel: ParallelState) -> list[Row]:
    """This data-parallel rank's rows of a batch that every rank holds, balanced by tokens."""
    owners = assign([packed_length(row.response_mask) for row in rows], [0] * len(rows), parallel.dp_size)
    return [row for row, owner in zip(rows, owners, strict=True) if owner == parallel.dp_rank]
