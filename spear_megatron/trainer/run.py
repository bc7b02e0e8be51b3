"""One run on this rank, with one short method per phase of the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from spear_megatron.algorithms.filters import group_spread, informative_groups
from spear_megatron.data.batch_files import BatchInfo, BatchRow
from spear_megatron.data.exchange import redistribute
from spear_megatron.data.index import IndexRow
from spear_megatron.data.packing import row_key
from spear_megatron.data.rows import group_rows, kl_penalties, masked_row, with_advantages
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.errors import RunError
from spear_megatron.rollout.collect import Collected
from spear_megatron.trainer.deal import Deal, plan_deal
from spear_megatron.trainer.imitation import NOTHING_REPLAYED, Replayed
from spear_megatron.trainer.metrics import filter_metrics
from spear_megatron.trainer.objective import ReplayTerm, UpdateKey
from spear_megatron.trainer.parts import MiniBatch
from spear_megatron.trainer.rollouts import RunRollouts
from spear_megatron.trainer.spikes import SpikeRule
from spear_megatron.trainer.scoring import GroupId, Scores, estimate, score
from spear_megatron.types import Row, TrajectoryId


@dataclass
class Run(RunRollouts):
    """The phases of a step. Every method is called by all ranks in the same order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._deal = Deal()
        self._passed = False
        self._replayed = NOTHING_REPLAYED
        self._replay_rows: list[Row] = []

    def _informative(self, step: int, index: Sequence[IndexRow]) -> set[GroupId]:
        """Groups whose rewards differ."""
        scores = self._score(step, index, ratio=1.0)
        return informative_groups(group_spread({key: scores.rewards[key] for key in scores.counted}))

    def score(self, step: int, index: Sequence[IndexRow]) -> Scores:
        """Shaped rewards, and what the filters leave to train on."""
        scores = self._score(step, index, ratio=self.settings.rollout_filter_ratio)
        if self.algorithm.filter_groups.enable:
            # Where no group tells anything all stay: their advantages are 0.
            scores = replace(scores, groups=frozenset(self._informative(step, index)) or scores.groups)
        self._metrics.update(filter_metrics(index, scores))
        return scores

    def _score(self, step: int, index: Sequence[IndexRow], *, ratio: float) -> Scores:
        config = self.algorithm
        mu = self.parts.curriculum.mu(step)
        kind = self.settings.rollout_filter_type
        return score(index, self.settings.rule, mu, config, ratio=ratio, kind=kind)

    def select_replay(self, step: int, scores: Scores, index: Sequence[IndexRow]) -> Replayed:
        """Good trajectories of earlier steps, judged by today's baseline; nothing without self-imitation."""
        if self.parts.imitation is None:
            return NOTHING_REPLAYED
        gamma = self.parts.curriculum.gamma(step)
        self._metrics["spear/gamma"] = gamma
        if not any(scores.trains_on(row.id) for row in index):
            return replace(NOTHING_REPLAYED, gamma=gamma)
        replayed = self.parts.imitation.select(step, scores.mu, gamma, num_sampled=len(scores.rewards))
        self._metrics.update(replayed.metrics)
        return replayed

    def deal(self, collected: Collected, scores: Scores, replayed: Replayed = NOTHING_REPLAYED) -> list[Row]:
        """Rows of the trajectories to train on, brought to the data-parallel rank that does, equal by tokens.

        Filtered trajectories come with an empty mask, unless their KL is part of the reward: then they lose it with
        :meth:`with_advantages`. Replayed ones travel with them and wait for their mini-batch.
        """
        masked = {} if self.algorithm.use_kl_in_reward else scores.masked
        parallel, timeout_s = self.parts.parallel, self.trainer.collective_timeout_s
        self._deal = plan_deal(
            [row for row in collected.index if scores.trains_on(row.id)],
            masked.keys(),
            replayed.tokens,
            groups_per_mini_batch=self.settings.ppo_mini_batch_size,
            rows_per_mini_batch=self.settings.ppo_mini_batch_size * self.settings.samples_per_prompt,
            num_ranks=parallel.dp_size,
            update=self.settings.replay_update,
        )
        self._metrics["perf/imbalance"] = self._deal.imbalance
        own = [
            masked_row(row) if row.trajectory in masked else row
            for row in group_rows(collected.groups)
            if scores.trains_on(row.trajectory)
        ]
        self._replayed = replayed
        self._replay_rows = []
        if self.parts.imitation is not None and replayed.tokens:
            self._replay_rows = self.parts.imitation.fetch(replayed, self._deal.replay_owner_of, timeout_s=timeout_s)
        return redistribute(own, self._deal.owner_of, parallel, timeout_s=timeout_s)

    @property
    def _num_updates(self) -> int:
        return len(self._deal.numbers) * self.settings.ppo_epochs

    def old_log_probs(self, rows: list[Row]) -> list[Row]:
        """Log-probs of the ratio's denominator: the trainer's before the update, or the engine's.

        A step with a single update on current weights needs no pass, unless something else reads them.
        """
        self._passed = False
        if self.settings.old_log_prob == "rollout":
            return [replace(row, old_log_probs=row.rollout_log_probs) for row in rows]
        needed = self.settings.needs_old_log_probs or self.algorithm.use_kl_in_reward
        if not self._deal.numbers or (self._num_updates == 1 and not needed):
            return rows
        rows, metrics = self.parts.actor.log_probs(rows)
        self._metrics.update(metrics)
        self._passed = True
        return rows

    def check_rollout(self, step: int, scores: Scores, rows: Sequence[Row]) -> Scores:
        """Compare the engine's log-probs with the trainer's where these are there before the update.

        Returns:
            Scores without the trajectories that differ too much, if those are to be masked.

        Raises:
            RunError: on every rank, when the step as a whole differs too much.
        """
        if not self._passed:
            return scores
        own = [row.old_log_probs for row in rows if row.old_log_probs is not None]
        self._judge(step, rows, own)
        masked = self._gate.masked(rows, own, step - 1)
        if self.settings.mismatch.mask is not None:
            self._metrics["filter/mismatch"] = len(masked) / max(len(scores.rewards), 1)
        counted = scores.counted if self.algorithm.filtered_in_statistics else scores.counted - masked.keys()
        return replace(scores, masked={**masked, **scores.masked}, counted=counted)

    def _judge(self, step: int, rows: Sequence[Row], log_probs: Sequence[torch.Tensor]) -> None:
        metrics, text = self._gate.judge(step, rows, log_probs, version=step - 1)
        self._measured = True
        self._metrics.update(metrics)
        if text is not None:
            self.parts.recorder.message(text)

    def reference_log_probs(self, rows: list[Row]) -> list[Row]:
        """Log-probs of the initial policy, where a KL term needs them."""
        if self.parts.reference is None or not self._deal.numbers:
            return rows
        return self.parts.actor.reference_log_probs(rows, self.parts.reference)

    def estimate(self, scores: Scores, index: Sequence[IndexRow], rows: Sequence[Row]) -> Scores:
        """Scores with the advantage of every trajectory, the same on every rank."""
        if self.algorithm.use_kl_in_reward:
            scores = self._penalised(scores, rows)
        penalty = self.settings.invalid_action_penalty
        scores = estimate(scores, index, self.algorithm, invalid_action_penalty=penalty)
        if scores.step_advantages:
            terms = [abs(value) for value in scores.step_advantages.values()]
            self._metrics["advantage/step_mean_abs"] = sum(terms) / len(terms)
        return scores

    def _penalised(self, scores: Scores, rows: Sequence[Row]) -> Scores:
        """Scores whose rewards lost the KL of their trajectory to the reference."""
        own = kl_penalties(rows, kind=self.algorithm.kl_penalty, coef=self.algorithm.kl_ctrl.kl_coef)
        penalties: dict[TrajectoryId, float] = {}
        for leader in gather_objects(self.parts.parallel, own if self.parts.parallel.is_leader else {}):
            for key, value in leader.items():
                penalties[key] = penalties.get(key, 0.0) + value
        self._metrics["actor/reward_kl_penalty"] = sum(penalties.values()) / max(len(penalties), 1)
        rewards = {key: reward - penalties.get(key, 0.0) for key, reward in scores.rewards.items()}
        return replace(scores, rewards=rewards)

    def with_advantages(self, rows: Sequence[Row], scores: Scores) -> list[Row]:
        """Rows whose sampled tokens carry their trajectory's advantage, and their segment's with GiGPO.

        Those of filtered trajectories carry no loss.
        """
        rows = [masked_row(row) if row.trajectory in scores.masked else row for row in rows]
        weight = self.algorithm.gigpo.step_advantage_w
        return with_advantages(rows, scores.advantages, scores.step_advantages, weight)

    def mini_batches(self, rows: Sequence[Row]) -> Iterator[MiniBatch]:
        """This rank's rows of every optimizer step, in order; nothing when no trajectory survived."""
        if not self._deal.numbers:
            self.progress.skipped_steps += 1
        rank = self._deal.mini_batch_of
        replay_rank = self._deal.replay_mini_batch_of
        for _ in range(self.settings.ppo_epochs):
            for number in self._deal.numbers:
                yield MiniBatch(
                    [row for row in rows if rank[row_key(row)] == number],
                    [row for row in self._replay_rows if replay_rank[row.trajectory] == number],
                )

    def update(self, step: int, mini_batch: MiniBatch) -> None:
        """One optimizer step; a step that is not finite is skipped everywhere, counted and saved.

        Raises:
            RunError: on every rank, after ``trainer.max_nonfinite_steps`` such steps in a row, or when engine and
                trainer are too far apart.
        """
        own_mini_batches = len(set(self._deal.mini_batch_of.values()))
        result = self.parts.actor.update(
            mini_batch.rows,
            on_policy=self._updates_done == 0 and self.settings.old_log_prob == "trainer",
            replay=ReplayTerm(rows=mini_batch.replayed, coefficient=self._replayed.gamma),
            key=UpdateKey(step, self._updates_done),
            advance_schedule=self._updates_done % max(len(self._deal.numbers), 1) < own_mini_batches,
            keep_log_probs=not self._measured,
            approve=lambda loss, norm: self._approve(step, loss, norm),
        )
        self.watch.beat()
        self._used.append(result.used)
        self._updates_done += 1
        if result.skipped is None:
            self._updates.append(result.metrics)
            self.progress.nonfinite_streak = 0
            if result.log_probs is not None:
                self._judge(step, mini_batch.rows, result.log_probs[: len(mini_batch.rows)])
        elif result.skipped in ("empty", "refused"):
            self.progress.skipped_steps += 1
        else:
            self._count_nonfinite(step, mini_batch, result.log_probs)

    def _approve(self, step: int, loss: float, norm: float) -> bool:
        """The verdict of ``trainer.loss_spike`` on an update."""
        verdict = SpikeRule(self.trainer.loss_spike, self.progress).judge(step, loss, norm)
        if verdict.ratio is not None:
            name = "training/spike_ratio"
            self._metrics[name] = max(self._metrics.get(name, 0.0), verdict.ratio)
        if verdict.text is not None:
            self.parts.recorder.message(verdict.text)
        if verdict.text is not None and self.trainer.loss_spike.action == "stop":
            self.stop_reason = self.stop_reason or verdict.text
        return verdict.apply

    def _count_nonfinite(self, step: int, batch: MiniBatch, log_probs: Sequence[torch.Tensor] | None) -> None:
        self.progress.nonfinite_steps += 1
        self.progress.nonfinite_streak += 1
        rows = [(row, False) for row in batch.rows] + [(row, True) for row in batch.replayed]
        # Where the log-probs of the update itself are not at hand, those before it are.
        values = log_probs or [None if replayed else row.old_log_probs for row, replayed in rows]
        saved = [
            BatchRow(row=row, log_probs=value, replayed=replayed)
            for (row, replayed), value in zip(rows, values, strict=True)
        ]
        update, text = self._updates_done - 1, f"step {step}: loss or gradient not finite, update skipped"
        info = BatchInfo(kind="nonfinite", step=step, update=update, policy_version=step - 1, reason=text)
        path = self._save_batch(info, saved)
        self.parts.recorder.message(f"{text}; batch saved to {path}")
        if self.progress.nonfinite_streak >= self.trainer.max_nonfinite_steps:
            raise RunError(
                f"{self.progress.nonfinite_streak} optimizer steps in a row were not finite (last: step {step}); "
                f"the batches are in {path.parent}. Lower actor_rollout_ref.actor.optim.lr or inspect them"
            )

    def push(self, collected: Collected, scores: Scores, rows: Sequence[Row]) -> None:
        """Put the step's good trajectories into the replay buffer, and its group means into the baseline."""
        if self.parts.imitation is None:
            return
        timeout_s = self.trainer.collective_timeout_s
        self._metrics.update(
            self.parts.imitation.push(self._step, collected, scores, rows, timeout_s=timeout_s)
        )
