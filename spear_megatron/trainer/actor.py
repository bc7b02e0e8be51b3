"""The policy on this rank: log-probs of rows and optimizer steps on rows, the same result in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from spear_megatron.algorithms.aggregation import count_totals, token_weights
from spear_megatron.algorithms.config import RolloutCorrectionConfig
from spear_megatron.data.packing import (
    WeightedRow,
    pack,
    packed_length,
    plan_packing,
    row_key,
    share_of_micro_batch,
    unpack,
)
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.kernels import linear_token_logprobs
from spear_megatron.model.head import HeadInput
from spear_megatron.parallel.agreement import agree_any, gather_objects
from spear_megatron.parallel.context import context_multiple, gathered_order
from spear_megatron.parallel.state import ParallelState
from spear_megatron.trainer.config import ActorConfig
from spear_megatron.trainer.figures import Figures, StepFigures, policy_metrics, reduce_figures, rollout_metrics
from spear_megatron.trainer.losses import MicroBatchLoss, figure, rollout_difference, supervised_loss
from spear_megatron.trainer.objective import Objective, ObjectiveBuilder, ReplayTerm, UpdateKey
from spear_megatron.trainer.optimizer import PolicyOptimizer
from spear_megatron.trainer.reference import Reference
from spear_megatron.trainer.schedule import run_forward, run_forward_backward
from spear_megatron.types import MicroBatch, Row, TrainBatch, TrajectoryId


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """Outcome of one optimizer step, equal on every rank.

    Attributes:
        skipped: None, or why weights, optimizer and schedule are untouched on every rank: ``nonfinite`` (loss or
            gradient), ``empty`` (no sampled token anywhere) or ``refused`` (by the caller).
        metrics: figures over all ranks; loss and gradient norm may be non-finite when skipped.
        used: tokens under covariance regularisation and token weight of each replayed trajectory.
        log_probs: float32 [n] per row, before the update: first of the rows, then of the replayed ones; None unless
            asked for. ``used`` and these are this rank's own, unlike the rest.
    """

    skipped: str | None
    metrics: dict[str, float]
    used: dict[TrajectoryId, tuple[int, float]] = field(default_factory=dict)
    log_probs: list[torch.Tensor] | None = None


NO_REPLAY = ReplayTerm()
EMPTY = StepFigures({}, {})


class Actor:
    """Model chunks with their optimizer. Every method is collective: all ranks call it, in the same order.

    Rows given to a method are this data-parallel rank's share (maybe none), the same on all ranks of its model copy.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: PolicyOptimizer,
        parallel: ParallelState,
        config: ActorConfig,
        *,
        valid_vocab: int,
        temperature: float,
        max_response_length: int,
        mini_batch_rows: int = 1,
        correction: RolloutCorrectionConfig | None = None,
        seed: int = 0,
    ) -> None:
        """Bind what an update needs.

        Args:
            chunks: Megatron model chunks of this rank, wrapped in its DistributedDataParallel.
            valid_vocab: entries of the vocabulary without padding.
            temperature: of sampling; logits are divided by it before every log-prob (supervised updates use 1).
            max_response_length: the constant L of seq-mean-token-sum-norm, in tokens.
            mini_batch_rows: trajectories of a full mini-batch (``sum_norm_denominator: micro_batch_share``).
            correction: ``algorithm.rollout_correction``; None is off.
            seed: root of the covariance draws.
        """
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self._parallel = parallel
        self._config = config
        self._valid_vocab = valid_vocab
        self._temperature = temperature
        self._objectives = ObjectiveBuilder(
            config=config,
            correction=correction or RolloutCorrectionConfig(),
            parallel=parallel,
            seed=seed,
            max_response_length=max_response_length,
            mini_batch_rows=mini_batch_rows,
            evaluate=lambda rows: self._evaluate(rows, with_entropy=False)[0],
        )

    def log_probs(self, rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Rows with ``old_log_probs`` of the current weights, in the given order, and what they tell.

        Metrics: ``actor/entropy`` (mean over sampled tokens) and the difference to the engine's log-probs; none where
        no rank has a sampled token.
        """
        values, figures = self._evaluate(rows, with_entropy=True)
        filled = [replace(row, old_log_probs=value) for row, value in zip(rows, values, strict=True)]
        if not figures.sums.get("tokens"):
            return filled, {}
        return filled, {"actor/entropy": figures.mean("entropy"), **rollout_metrics(figures)}

    def score(self, rows: Sequence[Row], temperature: float = 1.0) -> list[Row]:
        """Rows with ``old_log_probs`` of the current weights at a temperature of their own."""
        values, _ = self._evaluate(rows, with_entropy=False, temperature=temperature)
        return [replace(row, old_log_probs=value) for row, value in zip(rows, values, strict=True)]

    def reference_log_probs(self, rows: Sequence[Row], reference: Reference) -> list[Row]:
        """Rows with ``ref_log_probs`` of the reference weights, in the given order."""
        self.settle()
        with reference.swapped_in(self.chunks):
            values, _ = self._evaluate(rows, with_entropy=False)
        return [replace(row, ref_log_probs=value) for row, value in zip(rows, values, strict=True)]

    def settle(self) -> None:
        """Complete the weights of the last update on all ranks (``optimizer.settle``)."""
        with megatron_on_cpu():
            self.optimizer.settle()

    def update(
        self,
        rows: Sequence[Row],
        *,
        on_policy: bool = False,
        replay: ReplayTerm = NO_REPLAY,
        key: UpdateKey = UpdateKey(),
        advance_schedule: bool = True,
        keep_log_probs: bool = False,
        approve: Callable[[float, float], bool] | None = None,
    ) -> UpdateResult:
        """One optimizer step on the rows of one mini-batch and, with ``replay``, on replayed rows.

        Args:
            rows: with advantages, ``old_log_probs`` unless ``on_policy``, ``ref_log_probs`` if the loss has a KL term.
            on_policy: this is the step's first update, so the old log-probs are the current ones and need no pass.
            replay: the self-imitation term.
            key: names the optimizer step, for its random draws.
            advance_schedule: count the step in the learning-rate schedule.
            keep_log_probs: hand back the log-probs that the loss was computed with.
            approve: told the finite (loss, gradient norm), says whether the update is made; one no is enough.

        Raises:
            ValueError: a row lacks log-probs that the loss needs.
        """
        lr, kept = self.optimizer.lr, list[torch.Tensor]()
        objective, figures, norm = self.policy_gradients(
            rows, on_policy=on_policy, replay=replay, key=key, log_probs=kept if keep_log_probs else None
        )
        skipped = self._apply(figures, norm, advance_schedule, approve)
        if skipped == "empty":
            return UpdateResult(skipped, {})
        used = objective.used if skipped is None else {}
        metrics = objective.metrics | policy_metrics(figures, norm, lr)
        return UpdateResult(skipped, metrics, used, kept if keep_log_probs else None)

    def policy_gradients(
        self,
        rows: Sequence[Row],
        *,
        on_policy: bool = False,
        replay: ReplayTerm = NO_REPLAY,
        key: UpdateKey = UpdateKey(),
        log_probs: list[torch.Tensor] | None = None,
    ) -> tuple[Objective, StepFigures, float]:
        """Objective, loss figures and global gradient norm of a mini-batch; the gradients stay in the model.

        Arguments as in :meth:`update`; nothing is applied. ``log_probs`` takes those of ``rows`` and replayed rows.
        """
        self._require(rows, on_policy)
        objective = self._objectives.build(rows, replay, on_policy=on_policy, key=key)
        if objective.num_tokens == 0:
            return objective, EMPTY, 0.0
        figures, norm = self._gradients(
            objective.rows,
            objective.loss,
            temperature=self._temperature,
            with_entropy=True,
            share=self._config.sum_norm_denominator == "micro_batch_share",
            keep=log_probs,
        )
        return objective, figures, norm

    def sft_update(self, rows: Sequence[Row]) -> UpdateResult:
        """One optimizer step of masked cross-entropy, the mean over all tokens to learn of all ranks."""
        totals = count_totals(
            [row.trajectory for row in rows], [row.response_mask for row in rows], self._of_all_leaders
        )
        if totals.num_tokens == 0:
            return UpdateResult("empty", {})
        constants: dict[str, Any] = {"mode": "token-mean", "totals": totals, "max_response_length": 1}
        weighted = [WeightedRow(row, token_weights(row.response_mask, row=row.trajectory, **constants)) for row in rows]
        lr = self.optimizer.lr
        figures, norm = self._gradients(weighted, supervised_loss, temperature=1.0, with_entropy=False)
        skipped = self._apply(figures, norm)
        loss, tokens = figures.sums["loss"], figures.sums["tokens"]
        metrics = {"sft/loss": loss, "sft/grad_norm": norm, "sft/lr": lr, "sft/tokens": tokens}
        return UpdateResult(skipped, metrics)

    def _require(self, rows: Sequence[Row], on_policy: bool) -> None:
        for row in rows:
            if row.old_log_probs is None and not on_policy:
                raise ValueError(f"Row {row.trajectory}/{row.segment} has no old_log_probs: call Actor.log_probs.")
            if row.ref_log_probs is None and self._config.use_kl_loss:
                raise ValueError(
                    f"Row {row.trajectory}/{row.segment} has no ref_log_probs, which use_kl_loss needs; "
                    "call Actor.reference_log_probs first."
                )

    def _gradients(
        self,
        rows: Sequence[WeightedRow],
        loss: MicroBatchLoss,
        *,
        temperature: float,
        with_entropy: bool,
        share: bool = False,
        keep: list[torch.Tensor] | None = None,
    ) -> tuple[StepFigures, float]:
        def compute(head: HeadInput, batch: MicroBatch) -> tuple[torch.Tensor, tuple[Figures, torch.Tensor | None]]:
            log_probs, entropy = self._token_log_probs(head, batch, temperature, with_entropy)
            value, figures = loss(log_probs, entropy, batch)
            return value, (figures, None if keep is None else log_probs.detach().float())

        with megatron_on_cpu():
            self.optimizer.zero_grad()
            batch = self._pack(rows, share)
            parts = run_forward_backward(self.chunks, batch, compute, self._parallel)
            norm = self.optimizer.gradient_norm()
        if keep is not None:
            values = self._share_last_stage([value for _, value in parts], batch)
            keep += unpack(batch, values, [item.row for item in rows])
        return reduce_figures([figures for figures, _ in parts], self._parallel), norm

    def _apply(
        self,
        figures: StepFigures,
        norm: float,
        advance_schedule: bool = True,
        approve: Callable[[float, float], bool] | None = None,
    ) -> str | None:
        """Update the weights unless all ranks agree not to; why not, or None."""
        if figures is EMPTY:
            return "empty"
        if agree_any(self._parallel, not (math.isfinite(norm) and math.isfinite(figures.sums["loss"]))):
            return "nonfinite"
        if approve is not None and agree_any(self._parallel, not approve(figures.sums["loss"], norm)):
            return "refused"
        with megatron_on_cpu():
            self.optimizer.apply(norm, advance_schedule=advance_schedule)
        return None

    def _evaluate(
        self, rows: Sequence[Row], *, with_entropy: bool, temperature: float | None = None
    ) -> tuple[list[torch.Tensor], StepFigures]:
        """Log-probs of every row (float32 [n] on the host, 0 off its mask) on all ranks, and figures over all ranks."""
        ordered = sorted(rows, key=row_key)
        batch = self._pack([WeightedRow(row, torch.zeros(len(row.ids))) for row in ordered])
        scale = self._temperature if temperature is None else temperature

        def read(head: HeadInput, micro_batch: MicroBatch) -> tuple[torch.Tensor, Figures]:
            log_probs, entropy = self._token_log_probs(head, micro_batch, scale, with_entropy)
            mask = micro_batch.loss_mask
            sums, maxima = rollout_difference(log_probs[mask], micro_batch.rollout_log_probs[mask])
            sums["tokens"] = figure(mask)
            if entropy is not None:
                sums["entropy"] = figure(entropy[mask])
            return log_probs.float(), Figures(sums, maxima)

        results = run_forward(self.chunks, batch, read, self._parallel)
        values = self._share_last_stage([log_probs for log_probs, _ in results], batch)
        figures = reduce_figures([part for _, part in results], self._parallel)
        return unpack(batch, values, rows), figures

    def _token_log_probs(
        self, head: HeadInput, batch: MicroBatch, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs and entropies of the micro-batch's sampled tokens, float32 [T], 0 elsewhere."""
        parallel = self._parallel
        return linear_token_logprobs(
            head.hidden,
            head.weight,
            batch.targets,
            mask=batch.loss_mask,
            temperature=temperature,
            valid_vocab=self._valid_vocab,
            with_entropy=with_entropy,
            group=parallel.tp_group if parallel.tp_size > 1 else None,
            sequence_parallel=self._config.megatron.sequence_parallel,
            max_logits_bytes=self._config.max_logits_mb << 20,
            implementation=self._config.kernels,
        )

    def _share_last_stage(self, values: Sequence[torch.Tensor], batch: TrainBatch) -> list[torch.Tensor]:
        """Per-micro-batch results of the last stage, of all tokens, on every rank of the model copy, on the host."""
        parallel = self._parallel
        shape = (len(batch.micro_batches), len(batch.micro_batches[0].tokens))
        values = self._all_tokens(values, batch)
        if parallel.pp_size == 1:
            return [value.cpu() for value in values]
        stacked = torch.stack(list(values)) if values else torch.empty(shape, device=parallel.platform.device)
        last = dist.get_process_group_ranks(parallel.pp_group)[-1]
        dist.broadcast(stacked, last, group=parallel.pp_group)
        return list(stacked.cpu())

    def _all_tokens(self, values: Sequence[torch.Tensor], batch: TrainBatch) -> Sequence[torch.Tensor]:
        """Per-micro-batch results [T] from those of this context-parallel rank's tokens."""
        parallel = self._parallel
        if parallel.cp_size == 1 or not values:
            return values
        own = torch.stack(list(values)).contiguous()
        parts = [torch.empty_like(own) for _ in range(parallel.cp_size)]
        dist.all_gather(parts, own, group=parallel.cp_group)
        orders = [gathered_order(tuple(item.cu_seqlens.tolist()), parallel.cp_size) for item in batch.micro_batches]
        return [row[order.to(row.device)] for row, order in zip(torch.cat(parts, dim=1), orders, strict=True)]

    def _pack(self, rows: Sequence[WeightedRow], share: bool = False) -> TrainBatch:
        parallel = self._parallel
        ordered = sorted(rows, key=lambda item: row_key(item.row))
        plan = plan_packing(
            [packed_length(item.row.response_mask) for item in ordered],
            max_tokens=self._config.ppo_max_token_len_per_gpu,
            length_multiple=self._config.megatron.token_multiple,
            sequence_multiple=context_multiple(parallel.cp_size),
            count_multiple=parallel.pp_size if parallel.vpp_size else 1,
            reduce_max=self._max_over_ranks,
        )
        if share:
            ordered = share_of_micro_batch(ordered, plan)
        return pack(ordered, plan)

    def _of_all_leaders(self, own: dict[Hashable, int]) -> list[dict[Hashable, int]]:
        return gather_objects(self._parallel, own if self._parallel.is_leader else {})

    def _max_over_ranks(self, count: int) -> int:
        value = torch.tensor(count, dtype=torch.int64)
        if self._parallel.world_size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._parallel.cpu_group)
        return int(value)
