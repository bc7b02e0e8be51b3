"""Supervised cold start on the same model, packing and optimizer path as reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass

from spear_megatron.data.data_source import DataSource
from spear_megatron.data.rows import conversation_row
from spear_megatron.observability.record import Recorder
from spear_megatron.observability.timing import PhaseTimer
from spear_megatron.parallel.errors import RunError
from spear_megatron.trainer.actor import Actor


@dataclass(frozen=True, kw_only=True)
class SupervisedRun:
    """What the cold start needs; ``source`` gives this data-parallel rank's share of every batch."""

    actor: Actor
    source: DataSource
    recorder: Recorder
    total_steps: int


def train_supervised(run: SupervisedRun) -> float:
    """Masked cross-entropy for ``total_steps`` optimizer steps; returns the last step's loss in nats per token.

    Raises:
        RunError: loss or gradient was not finite.
    """
    timer = PhaseTimer()
    loss = float("nan")
    for step in range(1, run.total_steps + 1):
        batch = run.source.next_batch()
        rows = [
            conversation_row(place.position, example.ids, example.loss_mask)
            for place, example in zip(batch.places, batch.examples(), strict=True)
        ]
        with timer.phase("update_actor"):
            result = run.actor.sft_update(rows)
        if result.skipped is not None:
            raise RunError(f"supervised step {step} was skipped ({result.skipped}): lower sft.lr or check the data")
        loss = result.metrics["sft/loss"]
        run.recorder.write(step, {**result.metrics, **timer.take()})
    return loss
