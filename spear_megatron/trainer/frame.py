"""The frame around the steps of a run: start, phases, evaluation, record, checkpoint, resume, end."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spear_megatron.algorithms.config import AlgorithmConfig
from spear_megatron.checkpoint.store import step_name
from spear_megatron.data.batch_files import BatchInfo, BatchRow
from spear_megatron.data.files import FileEntry
from spear_megatron.evaluation.run import evaluate
from spear_megatron.observability.timing import PhaseTimer
from spear_megatron.observability.trajectories import Kind
from spear_megatron.parallel.agreement import agree_any, agreed, gather_objects
from spear_megatron.parallel.errors import RunError, named_waits
from spear_megatron.rollout.collect import Collected, Tasks
from spear_megatron.trainer.mismatch_gate import MismatchGate
from spear_megatron.trainer.metrics import mean_metrics, replay_token_share, rollout_metrics, throughput_metrics
from spear_megatron.trainer.parts import Parts, Progress, StepSettings
from spear_megatron.trainer.run_config import TrainerConfig
from spear_megatron.trainer.scoring import Scores
from spear_megatron.trainer.watch import Watch
from spear_megatron.types import Group, TrajectoryId


@dataclass
class RunFrame:
    """One run on this rank, but for the phases of a step. All ranks call every method in the same order."""

    parts: Parts
    settings: StepSettings
    trainer: TrainerConfig
    algorithm: AlgorithmConfig
    progress: Progress = field(default_factory=Progress)
    stopping: bool = False
    stop_reason: str | None = None

    def __post_init__(self) -> None:
        self.watch = Watch(self.trainer, self.parts.parallel)
        self._timer = PhaseTimer()
        self._metrics: dict[str, float] = {}
        self._updates: list[dict[str, float]] = []
        self._updates_done = 0
        self._used: list[Mapping[TrajectoryId, tuple[int, float]]] = []
        self._notes: list[str] = []
        self._gate = MismatchGate(self.settings.mismatch, self.parts.parallel, self._save_batch)
        self._measured = False
        self._step = 0
        self._published = 0

    def begin(self) -> None:
        """Give the engine the current weights; before the first step, evaluate once."""
        self.watch.start()
        for note in self._notes:
            self.parts.recorder.message(note)
        self.publish(version=self.progress.step)
        if self.progress.step == 0 and self.trainer.val_before_train:
            with self.phase("testing"):
                self._evaluate(0)
            self.parts.recorder.write(0, {**self._metrics, **self._timer.take()})
        self._timer.take()

    def remaining_steps(self) -> Iterator[int]:
        """1-based step numbers that are still to do; entering a step resets its figures."""
        for step in range(self.progress.step + 1, self.trainer.total_training_steps + 1):
            self._metrics, self._updates, self._updates_done, self._used, self._step = {}, [], 0, [], step
            self._measured = False
            self.watch.begin_step(step)
            if self.parts.imitation is not None:
                self.parts.imitation.begin_step()
            yield step

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a phase, and name it when other ranks do not answer in it."""
        where = f"rank {self.parts.parallel.rank}, step {self._step}, phase '{name}'"
        with self._timer.phase(name), self.watch.phase(name), named_waits(where):
            yield

    def begin_training(self) -> None:
        """Generation is over until the next publication: servers on the trainer's GPUs make room."""
        self.parts.to_training()

    def publish(self, version: int) -> None:
        """Give the engine the current weights; tokens sampled from now on carry ``version``."""
        self.parts.actor.settle()
        outcome = self.parts.publish_weights(version)
        if outcome is not None:
            self._metrics.update(outcome.metrics())
            for note in outcome.notes:
                self.parts.recorder.message(note)
        self._published = version

    def evaluate_if_due(self, step: int) -> None:
        """Measure held-out success every ``trainer.test_freq`` steps and after the last one."""
        if self.trainer.test_freq > 0 and (step % self.trainer.test_freq == 0 or self._is_last(step)):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        tasks = Tasks(
            purpose="val",
            step=step,
            prompts=tuple(enumerate(self.parts.val_prompts)),
            num_samples=self.settings.val_samples,
            sampling=self.settings.val_sampling,
        )
        result = evaluate(
            self.parts.collector,
            tasks,
            parallel=self.parts.parallel,
            answer_of=self.parts.answer_of,
            name=f"step {step}",
            ks=(self.settings.val_samples,),
            seed=self.trainer.seed,
        )
        self._metrics.update(result.report.scalars("val/"))
        self._keep_trajectories(step, result.groups, {}, kind="val")

    def record(self, step: int, collected: Collected, scores: Scores) -> None:
        """One line of the record, before the step's checkpoint: a crash between them loses nothing."""
        timings = self._timer.take()
        imitation = self.parts.imitation
        pushed = imitation.pushed_ids if imitation is not None else ()
        self._keep_trajectories(step, collected.groups, scores.rewards, keep_ids=pushed)
        lineage = imitation.lineage(step, scores, self._used) if imitation is not None else None
        metrics = self._step_metrics(collected, scores, timings)
        with agreed(self.parts.parallel, f"recording of step {step}"):
            if lineage is not None and self.parts.lineage is not None:
                self.parts.lineage.write(step, lineage)
            self.parts.recorder.write(step, metrics)
        self.progress.step = step

    def _step_metrics(
        self, collected: Collected, scores: Scores, timings: Mapping[str, float]
    ) -> dict[str, float]:
        """The figures of a step; collective."""
        return {
            **mean_metrics(self._updates),
            **replay_token_share(self._updates),
            **rollout_metrics(collected.index, scores),
            **throughput_metrics(collected.index, timings, self.parts.parallel.world_size),
            **self._engine_metrics(),
            **self.watch.take(timings["timing_s/step"]),
            **self._metrics,
            "training/num_optimizer_steps": float(len(self._updates)),
            "training/skipped_steps": float(self.progress.skipped_steps),
            "training/nonfinite_steps": float(self.progress.nonfinite_steps),
            "training/loss_spikes": float(self.progress.loss_spikes),
            **timings,
        }

    def _keep_trajectories(
        self,
        step: int,
        groups: Sequence[Group],
        rewards: Mapping[TrajectoryId, float],
        kind: Kind = "train",
        keep_ids: Collection[TrajectoryId] = (),
    ) -> None:
        """Write what people look at; collective. A disk that refuses is told and counted, and stops no training."""
        problem = None
        if self.parts.trajectories is not None:
            try:
                self.parts.trajectories.write(step, groups, rewards, kind=kind, keep_ids=keep_ids)
            except OSError as error:
                problem = str(error)
        lost = [text for text in gather_objects(self.parts.parallel, problem) if text is not None]
        if lost:
            self.parts.recorder.message(f"step {step}: trajectories of {len(lost)} ranks could not be kept: {lost[0]}")
        self._metrics["training/trajectories_lost"] = self._metrics.get("training/trajectories_lost", 0.0) + len(lost)

    def _engine_metrics(self) -> dict[str, float]:
        """Figures of the engine, summed over the leaders."""
        if self.parts.engine_metrics is None:
            return {}
        figures: dict[str, float] = {}
        for part in gather_objects(self.parts.parallel, self.parts.engine_metrics()):
            for name, value in part.items():
                figures[name] = figures.get(name, 0.0) + value
        return figures

    def save_if_due(self, step: int) -> None:
        """Checkpoint when due, after the last step, and when a stop signal reached any rank or the run stops itself."""
        asked = self.parts.stop_requested() or self.stop_reason is not None
        self.stopping = agree_any(self.parts.parallel, asked)
        freq = self.trainer.save_freq
        with self.phase("save"):
            if self.stopping or self._is_last(step) or (freq > 0 and step % freq == 0):
                self._save(step)
            else:
                self.parts.checkpoints.poll()

    def _save(self, step: int) -> None:
        optimizer = self.parts.actor.optimizer
        states = {"progress": vars(self.progress).copy(), "prompt_source": self.parts.prompts.state_dict()}
        external: Sequence[FileEntry] = ()
        states |= self._rollout_states()
        if self.parts.imitation is not None:
            states["replay"], external = self.parts.imitation.snapshot()
        self.parts.checkpoints.save(
            step, self.parts.actor.chunks, optimizer.megatron, optimizer.scheduler, states, external=external
        )

    def _save_batch(self, info: BatchInfo, rows: Sequence[BatchRow]) -> Path:
        """Keep a batch that something is wrong with, and name the checkpoint nearest to its weights."""
        with agreed(self.parts.parallel, "saving of a batch"):
            older = [step for step in self.parts.checkpoints.steps() if step <= info.policy_version]
        checkpoint = f"checkpoints/{step_name(max(older))}" if older else None
        return self.parts.batch_files.save(replace(info, checkpoint=checkpoint), rows)

    @abstractmethod
    def _rollout_states(self) -> dict[str, Any]:
        """States of rollouts that a checkpoint has to hold; collective."""

    @abstractmethod
    def _restore_rollouts(self, states: Mapping[str, Any]) -> None:
        """Take up what :meth:`_rollout_states` gave; collective."""

    def restore(self) -> int | None:
        """Continue from the newest good checkpoint; returns its step, or None without any.

        Raises:
            ValueError: the checkpoint is beyond the last step, or was made with other prompts.
        """
        actor = self.parts.actor
        loaded = self.parts.checkpoints.load_latest(
            actor.chunks, actor.optimizer.megatron, actor.optimizer.scheduler, required=("progress", "prompt_source")
        )
        if loaded is None:
            return None
        if loaded.step > self.trainer.total_training_steps:
            raise ValueError(
                f"{self.trainer.default_local_dir} is already at step {loaded.step}, beyond "
                f"trainer.total_training_steps={self.trainer.total_training_steps}: raise it, or choose another "
                "trainer.default_local_dir"
            )
        actor.optimizer.follow_configuration()
        self.progress = Progress(**loaded.states["progress"])
        self.parts.prompts.load_state_dict(loaded.states["prompt_source"])
        self._restore_rollouts(loaded.states)
        if self.parts.imitation is not None and "replay" not in loaded.states:
            self._notes.append(f"the checkpoint of step {loaded.step} has no replay buffer: it starts empty")
        elif self.parts.imitation is not None:
            counts = self.parts.imitation.buffer.restore(loaded.states["replay"], loaded.manifest.external)
            reasons = {"temperature": "were sampled at another temperature", "length": "do not fit a micro-batch"}
            self._notes += [
                f"{counts[name]} trajectories of the replay buffer {reason}: dropped"
                for name, reason in reasons.items()
                if counts[name]
            ]
        return loaded.step

    def finish(self) -> None:
        """Complete a save under way and, when the run is done, export the model in Hugging Face format.

        Raises:
            RunError: the run stopped itself; the message says why and how to go on.
        """
        self.parts.checkpoints.wait()
        if self._is_last(self.progress.step):
            told = f"done: {self.progress.step} steps"
            if self.trainer.save_hf:
                folder = Path(self.trainer.default_local_dir) / "hf"
                self.parts.export(folder)
                told += f", the model is in {folder}"
            self.parts.recorder.message(told)
        if self.stopping and self.stop_reason is None:
            text = f"stopped by signal after step {self.progress.step}; the same command continues"
            self.parts.recorder.message(text)
        self.parts.recorder.close()
        if self.stop_reason is not None:
            raise RunError(
                f"{self.stop_reason}. Stopped after step {self.progress.step} with a checkpoint: the same command "
                "continues, with trainer.loss_spike.action=warn over it"
            )

    def _is_last(self, step: int) -> bool:
        return step == self.trainer.total_training_steps
