"""Everything one training run holds, with one short method per phase of the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spear_megatron.algorithms.config import AlgorithmConfig
from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.data.balance import assign, imbalance, mini_batches
from spear_megatron.data.exchange import redistribute, row_to_record
from spear_megatron.data.index import IndexRow
from spear_megatron.data.packing import RowKey, row_key
from spear_megatron.data.prompts import PromptSource
from spear_megatron.data.rows import group_rows, kl_penalties, trajectory_advantages
from spear_megatron.evaluation.run import evaluate
from spear_megatron.observability.record import Recorder
from spear_megatron.observability.timing import PhaseTimer
from spear_megatron.observability.trajectories import TrajectoryStore
from spear_megatron.parallel.agreement import agree_any, gather_objects
from spear_megatron.parallel.errors import RunError, named_waits
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rewards.compose import shaped_reward
from spear_megatron.rollout.collect import Collected, Collector, Tasks
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.trainer.actor import Actor
from spear_megatron.trainer.metrics import mean_metrics, rollout_metrics, throughput_metrics
from spear_megatron.trainer.reference import Reference
from spear_megatron.trainer.run_config import TrainerConfig
from spear_megatron.types import Prompt, Row, Trajectory, TrajectoryId


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components a run is made of, built once by the command line layer."""

    parallel: ParallelState
    actor: Actor
    reference: Reference | None
    prompts: PromptSource
    val_prompts: Sequence[Prompt]
    collector: Collector
    checkpoints: CheckpointManager
    recorder: Recorder
    trajectories: TrajectoryStore | None
    publish_weights: Callable[[int], None]
    export: Callable[[Path], None]
    answer_of: Callable[[Trajectory], str | None]
    stop_requested: Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Plain values that the phases need."""

    prompts_per_step: int
    samples_per_prompt: int
    sampling: SamplingParams
    val_samples: int
    val_sampling: SamplingParams
    ppo_mini_batch_size: int
    ppo_epochs: int


@dataclass
class Progress:
    """What the loop has to remember across a restart, besides weights, optimizer and prompts."""

    step: int = 0
    skipped_steps: int = 0
    nonfinite_steps: int = 0
    nonfinite_streak: int = 0


@dataclass
class Run:
    """One run on this rank. Every method is called by all ranks in the same order."""

    parts: Parts
    settings: StepSettings
    trainer: TrainerConfig
    algorithm: AlgorithmConfig
    progress: Progress = field(default_factory=Progress)
    stopping: bool = False

    def __post_init__(self) -> None:
        self._timer = PhaseTimer()
        self._metrics: dict[str, float] = {}
        self._updates: list[dict[str, float]] = []
        self._mini_batch_of: dict[RowKey, int] = {}
        self._updates_done = 0
        self._step = 0

    def begin(self) -> None:
        """Give the engine the current weights; before the first step, evaluate once."""
        self.publish(version=self.progress.step)
        if self.progress.step == 0 and self.trainer.val_before_train:
            with self.phase("testing"):
                self._evaluate(0)
            self.parts.recorder.write(0, {**self._metrics, **self._timer.take()})
        self._timer.take()

    def remaining_steps(self) -> Iterator[int]:
        """1-based step numbers that are still to do; entering a step resets its figures."""
        for step in range(self.progress.step + 1, self.trainer.total_training_steps + 1):
            self._metrics, self._updates, self._updates_done, self._step = {}, [], 0, step
            yield step

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a phase, and name it when other ranks do not answer in it."""
        where = f"rank {self.parts.parallel.rank}, step {self._step}, phase '{name}'"
        with self._timer.phase(name), named_waits(where):
            yield

    def collect(self, step: int) -> Collected:
        """This step's task groups, rolled out by the current policy."""
        first = self.parts.prompts.position
        prompts = self.parts.prompts.take(self.settings.prompts_per_step)
        self._metrics["training/policy_version"] = float(step - 1)
        return self.parts.collector.collect(
            Tasks(
                purpose="train",
                step=step,
                prompts=tuple(enumerate(prompts, first)),
                num_samples=self.settings.samples_per_prompt,
                sampling=self.settings.sampling,
            )
        )

    def deal(self, collected: Collected) -> list[Row]:
        """Rows of valid trajectories, brought to the data-parallel rank that trains on them, equal by tokens.

        A row without a sampled token costs nothing, but stays: it counts where a loss is a mean over rows.
        """
        keys: list[RowKey] = []
        costs: list[float] = []
        for row in collected.index:
            for segment, (length, sampled) in enumerate(zip(row.segment_lengths, row.sampled_lengths, strict=True)):
                if row.valid:
                    keys.append((row.id, segment))
                    costs.append(float(length) if sampled else 0.0)
        numbers = mini_batches([key[0].group for key in keys], self.settings.ppo_mini_batch_size)
        owners = assign(costs, numbers, self.parts.parallel.dp_size)
        self._mini_batch_of = dict(zip(keys, numbers, strict=True))
        self._metrics["perf/imbalance"] = imbalance(costs, owners, self.parts.parallel.dp_size)
        destination = dict(zip(keys, owners, strict=True))
        rows = group_rows(collected.groups)
        return redistribute(rows, destination, self.parts.parallel, timeout_s=self.trainer.collective_timeout_s)

    @property
    def _num_updates(self) -> int:
        return len(set(self._mini_batch_of.values())) * self.settings.ppo_epochs

    def old_log_probs(self, rows: list[Row]) -> list[Row]:
        """Trainer log-probs before the update; a step with a single update on current weights needs no pass."""
        if not self._mini_batch_of or (self._num_updates == 1 and not self.algorithm.use_kl_in_reward):
            return rows
        rows, metrics = self.parts.actor.log_probs(rows)
        self._metrics.update(metrics)
        return rows

    def reference_log_probs(self, rows: list[Row]) -> list[Row]:
        """Log-probs of the initial policy, where a KL term needs them."""
        if self.parts.reference is None or not self._mini_batch_of:
            return rows
        return self.parts.actor.reference_log_probs(rows, self.parts.reference)

    def shaped_rewards(self, index: Sequence[IndexRow], rows: Sequence[Row]) -> dict[TrajectoryId, float]:
        """The reward of every valid trajectory that advantages are made of, the same on every rank."""
        rewards = {row.id: shaped_reward(row.reward) for row in index if row.valid}
        if not self.algorithm.use_kl_in_reward:
            return rewards
        own = kl_penalties(rows, kind=self.algorithm.kl_penalty, coef=self.algorithm.kl_ctrl.kl_coef)
        penalties: dict[TrajectoryId, float] = {}
        sources = range(0, self.parts.parallel.world_size)
        leaders = gather_objects(self.parts.parallel, own if self.parts.parallel.is_leader else {})
        for rank in sources:
            for key, value in leaders[rank].items():
                penalties[key] = penalties.get(key, 0.0) + value
        self._metrics["actor/reward_kl_penalty"] = sum(penalties.values()) / max(len(rewards), 1)
        return {key: reward - penalties.get(key, 0.0) for key, reward in rewards.items()}

    def advantages(self, rewards: Mapping[TrajectoryId, float]) -> dict[TrajectoryId, float]:
        """Group-relative advantage of every valid trajectory, by id."""
        return trajectory_advantages(rewards, norm_by_std=self.algorithm.norm_adv_by_std_in_grpo)

    def mini_batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """This rank's rows of every optimizer step, in order; nothing when no trajectory survived."""
        numbers = sorted(set(self._mini_batch_of.values()))
        if not numbers:
            self.progress.skipped_steps += 1
        for _ in range(self.settings.ppo_epochs):
            for number in numbers:
                yield [row for row in rows if self._mini_batch_of[row_key(row)] == number]

    def update(self, step: int, mini_batch: Sequence[Row]) -> None:
        """One optimizer step; a step that is not finite is skipped everywhere, counted and saved.

        Raises:
            RunError: on every rank, after ``trainer.max_nonfinite_steps`` such steps in a row.
        """
        result = self.parts.actor.update(mini_batch, on_policy=self._updates_done == 0)
        self._updates_done += 1
        if result.skipped is None:
            self._updates.append(result.metrics)
            self.progress.nonfinite_streak = 0
            return
        if result.skipped == "empty":
            self.progress.skipped_steps += 1
            return
        self.progress.nonfinite_steps += 1
        self.progress.nonfinite_streak += 1
        path = self._save_batch(step, mini_batch)
        self.parts.recorder.message(f"step {step}: loss or gradient not finite, update skipped; batch saved to {path}")
        if self.progress.nonfinite_streak >= self.trainer.max_nonfinite_steps:
            raise RunError(
                f"{self.progress.nonfinite_streak} optimizer steps in a row were not finite (last: step {step}); "
                f"the batches are in {path.parent}. Lower actor_rollout_ref.actor.optim.lr or inspect them"
            )

    def _save_batch(self, step: int, rows: Sequence[Row]) -> Path:
        folder = Path(self.trainer.default_local_dir) / "nonfinite"
        path = folder / f"step_{step:06d}.rank_{self.parts.parallel.rank}.pt"
        if self.parts.parallel.is_leader:
            folder.mkdir(parents=True, exist_ok=True)
            records = [row_to_record(row) for row in rows]
            torch.save([{"fields": dict(record.fields), **record.tensors} for record in records], path)
        return path

    def publish(self, version: int) -> None:
        """Give the engine the current weights; tokens sampled from now on carry ``version``."""
        self.parts.publish_weights(version)

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
        if self.parts.trajectories is not None:
            self.parts.trajectories.write(step, result.groups, {}, kind="val")

    def record(
        self,
        step: int,
        collected: Collected,
        rewards: Mapping[TrajectoryId, float],
        advantages: Mapping[TrajectoryId, float],
    ) -> None:
        """One line of the record, before the step's checkpoint: a crash between them loses nothing."""
        timings = self._timer.take()
        if self.parts.trajectories is not None:
            self.parts.trajectories.write(step, collected.groups, rewards)
        self.parts.recorder.write(
            step,
            {
                **mean_metrics(self._updates),
                **rollout_metrics(collected.index, rewards, advantages),
                **throughput_metrics(collected.index, timings, self.parts.parallel.world_size),
                **self._metrics,
                "training/num_optimizer_steps": float(len(self._updates)),
                "training/skipped_steps": float(self.progress.skipped_steps),
                "training/nonfinite_steps": float(self.progress.nonfinite_steps),
                **timings,
            },
        )
        self.progress.step = step

    def save_if_due(self, step: int) -> None:
        """Checkpoint when due, after the last step, and when a stop signal reached any rank."""
        self.stopping = agree_any(self.parts.parallel, self.parts.stop_requested())
        freq = self.trainer.save_freq
        with self.phase("save"):
            if self.stopping or self._is_last(step) or (freq > 0 and step % freq == 0):
                self._save(step)
            else:
                self.parts.checkpoints.poll()

    def _save(self, step: int) -> None:
        optimizer = self.parts.actor.optimizer
        states = {"progress": vars(self.progress).copy(), "prompt_source": self.parts.prompts.state_dict()}
        self.parts.checkpoints.save(step, self.parts.actor.chunks, optimizer.megatron, optimizer.scheduler, states)

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
        return loaded.step

    def finish(self) -> None:
        """Complete a save under way and, when the run is done, export the model in Hugging Face format."""
        self.parts.checkpoints.wait()
        if self.trainer.save_hf and self._is_last(self.progress.step):
            self.parts.export(Path(self.trainer.default_local_dir) / "hf")
        if self.stopping:
            text = f"stopped by signal after step {self.progress.step}; the same command continues"
            self.parts.recorder.message(text)
        self.parts.recorder.close()

    def _is_last(self, step: int) -> bool:
        return step == self.trainer.total_training_steps
