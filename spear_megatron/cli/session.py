"""What every training command opens first and closes last: process groups, signals, the record."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import torch

from spear_megatron.cli.preflight import save_resolved
from spear_megatron.config.schema import Config
from spear_megatron.device.host_memory import keep_freed_memory
from spear_megatron.observability.record import NullRecorder, Recorder, RunRecorder
from spear_megatron.parallel.agreement import agreed
from spear_megatron.parallel.launch import local_world_size
from spear_megatron.parallel.state import ParallelState, initialize


@contextlib.contextmanager
def open_parallel(config: Config) -> Iterator[ParallelState]:
    """Process groups of the configured layout, and the CPU threads of this rank.

    After a failure the groups of several ranks are left to the end of the process: tearing them down may wait for
    peers that are busy in a collective.
    """
    megatron = config.actor_rollout_ref.actor.megatron
    torch.set_num_threads(config.trainer.num_threads or default_threads())
    parallel = initialize(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        cp=megatron.context_parallel_size,
        vpp=megatron.virtual_pipeline_model_parallel_size,
        seed=config.trainer.seed,
        timeout_s=config.trainer.collective_timeout_s,
    )
    if not parallel.platform.is_cuda:
        keep_freed_memory()
    failed = True
    try:
        yield parallel
        failed = False
    finally:
        if not failed or parallel.world_size == 1:
            parallel.destroy()


def default_threads() -> int:
    """CPU threads of one of this host's ranks: an equal share of the cores that the job may use."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by SIGTERM or SIGUSR1 (what schedulers send before the end); read at step boundaries."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in _STOP_SIGNALS:
            signal.signal(number, self._handle)

    def retire(self) -> None:
        """After a stop that was asked for: a repeated signal must not kill the process while the interpreter ends,
        where Python's own handlers are gone already."""
        if self.requested:
            for number in _STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextlib.contextmanager
def open_record(
    config: Config, parallel: ParallelState, resume_step: int | None, console_every: int = 1
) -> Iterator[Recorder]:
    """The run directory with the resolved configuration and the record, on rank 0; nothing on the others.

    ``console_every``: steps per line on the console; the record holds every step.

    Raises:
        ValueError: the record to continue is damaged.
        RunError: the folder cannot be used, on all of several ranks.
    """
    recorder: Recorder = NullRecorder()
    with agreed(parallel, "opening of the run directory"):
        if parallel.rank == 0:
            trainer = config.trainer
            save_resolved(config)
            recorder = RunRecorder(
                trainer.default_local_dir,
                trainer.logger,
                resume_step=resume_step,
                total_steps=trainer.total_training_steps,
                console_every=console_every,
            )
    try:
        yield recorder
    finally:
        recorder.close()
