"""Supervised cold start on the same model, packing and optimizer path as reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass

from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.data.data_source import DataSource
from spear_megatron.data.rows import conversation_row
from spear_megatron.observability.record import Recorder
from spear_megatron.observability.timing import PhaseTimer
from spear_megatron.parallel.errors import RunError
from spear_megatron.trainer.actor import Actor


@dataclass(frozen=True, kw_only=True)
class SupervisedRun:
    """What the cold start needs.

    Attributes:
        source: gives this data-parallel rank's share of every batch.
        done_steps: optimizer steps that actor and source have behind them.
        checkpoints: where to save every ``save_freq`` steps and after the last one; None saves nothing.
    """

    actor: Actor
    source: DataSource
    recorder: Recorder
    total_steps: int
    done_steps: int = 0
    checkpoints: CheckpointManager | None = None
    save_freq: int = -1


def restore_supervised(actor: Actor, source: DataSource, checkpoints: CheckpointManager, total_steps: int) -> int:
    """Continue from the newest good checkpoint, written on any number of ranks; returns its step, 0 without any.

    Raises:
        ValueError: the checkpoint is beyond ``total_steps``, or its conversations or their order are others.
        RunError: none of the checkpoints can be used.
    """
    optimizer = actor.optimizer
    loaded = checkpoints.load_latest(
        actor.chunks, optimizer.megatron, optimizer.scheduler, required=("data_source",)
    )
    if loaded is None:
        return 0
    if loaded.step > total_steps:
        raise ValueError(
            f"{loaded.path} is beyond sft.total_training_steps={total_steps}: raise it, or choose another "
            "sft.default_local_dir"
        )
    optimizer.follow_configuration()
    source.load_state_dict(loaded.states["data_source"])
    return loaded.step


def train_supervised(run: SupervisedRun) -> float:
    """Masked cross-entropy up to ``total_steps`` optimizer steps; returns the last step's loss in nats per token.

    Raises:
        RunError: loss or gradient was not finite, or a checkpoint cannot be written.
    """
    timer = PhaseTimer()
    loss = float("nan")
    for step in range(run.done_steps + 1, run.total_steps + 1):
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
        if run.checkpoints is not None and (step % run.save_freq == 0 or step == run.total_steps):
            run.actor.settle()
            optimizer, states = run.actor.optimizer, {"data_source": run.source.state_dict()}
            run.checkpoints.save(step, run.actor.chunks, optimizer.megatron, optimizer.scheduler, states)
    if run.checkpoints is not None:
        run.checkpoints.wait()
    run.actor.settle()
    return loss
