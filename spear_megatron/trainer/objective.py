"""From the rows of one optimizer step to weighted rows and a loss: normalisers, gamma, corrections, selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from spear_megatron.algorithms.aggregation import Totals, count_totals, token_weights
from spear_megatron.algorithms.config import RolloutCorrectionConfig
from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, Selection, TokenSet, select_tokens, token_keys
from spear_megatron.algorithms.draw import alone
from spear_megatron.algorithms.off_policy import LOG_RATIO_LIMIT, off_policy_weights
from spear_megatron.data.packing import WeightedRow, row_key
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.seeds import derive_key
from spear_megatron.parallel.state import ParallelState
from spear_megatron.trainer.config import ActorConfig
from spear_megatron.trainer.losses import PolicyLoss, SurrogateRule
from spear_megatron.types import Row, TrajectoryId

Evaluate = Callable[[Sequence[Row]], list[torch.Tensor]]
"""Current log-probs (float32 [n]) of rows; collective over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayTerm:
    """The self-imitation term of one optimizer step.

    Attributes:
        rows: this data-parallel rank's replayed rows, with recalibrated advantages and their stored log-probs.
        coefficient: gamma(t).
    """

    rows: Sequence[Row] = ()
    coefficient: float = 0.0


@dataclass(frozen=True, slots=True)
class UpdateKey:
    """Names an optimizer step (1-based training step, 0-based update within it): keys of its random draws."""

    step: int = 0
    update: int = 0


@dataclass(frozen=True, slots=True)
class Objective:
    """What one optimizer step minimises.

    Attributes:
        rows: this rank's rows of both terms.
        num_tokens: sampled tokens of both terms over all ranks.
        metrics: counts of the covariance selection.
        used: selected tokens and token weight of each of this rank's replayed trajectories.
    """

    rows: list[WeightedRow]
    loss: PolicyLoss
    num_tokens: int
    metrics: dict[str, float]
    used: dict[TrajectoryId, tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveBuilder:
    """Builds :class:`Objective`; every rank calls it with its own rows.

    Attributes:
        max_response_length: L of seq-mean-token-sum-norm.
        mini_batch_rows: trajectories of a full mini-batch, for ``sum_norm_denominator: micro_batch_share``.
        evaluate: current log-probs, for a covariance selection over the whole mini-batch.
    """

    config: ActorConfig
    correction: RolloutCorrectionConfig
    parallel: ParallelState
    seed: int
    max_response_length: int
    mini_batch_rows: int
    evaluate: Evaluate

    def build(self, rows: Sequence[Row], replay: ReplayTerm, *, on_policy: bool, key: UpdateKey) -> Objective:
        """Weigh, correct and select; collective.

        Args:
            on_policy: the weights are those that ``old_log_probs`` of ``rows`` were computed with.
            key: keys the covariance draw, so that it does not depend on the layout.
        """
        totals, replay_totals = self._totals(rows), self._totals(replay.rows)
        own = self._weigh(rows, totals, replayed=False, scale=1.0)
        replayed = self._weigh(replay.rows, replay_totals, replayed=True, scale=replay.coefficient)
        weighted, metrics = self._regularise([*own, *replayed], on_policy, key, (totals, replay_totals))
        entropy = self.config.entropy_coeff
        loss = PolicyLoss(
            rule=self._rule(replayed=False),
            replay_rule=self._rule(replayed=True),
            entropy_weight=entropy / max(totals.num_tokens, 1),
            replay_entropy_weight=(
                replay.coefficient * entropy / max(replay_totals.num_tokens, 1)
                if self.config.replay.entropy_bonus
                else 0.0
            ),
            kl_coef=self.config.kl_loss_coef if self.config.use_kl_loss else 0.0,
            kl_kind=self.config.kl_loss_type,
            on_policy=on_policy,
            engine_ratio=self.config.old_log_prob == "rollout",
        )
        used = _used(weighted)
        return Objective(weighted, loss, totals.num_tokens + replay_totals.num_tokens, metrics, used)

    def _row_id(self, row: Row) -> Hashable:
        return row.trajectory if self.config.loss_rows == "trajectory" else row_key(row)

    def _totals(self, rows: Sequence[Row]) -> Totals:
        ids, masks = [self._row_id(row) for row in rows], [row.response_mask for row in rows]
        return count_totals(ids, masks, self._of_all_leaders)

    def _weigh(self, rows: Sequence[Row], totals: Totals, *, replayed: bool, scale: float) -> list[WeightedRow]:
        corrections = self._corrections(rows)
        weighted = []
        for row, correction in zip(rows, corrections, strict=True):
            weights = token_weights(
                row.response_mask,
                row=self._row_id(row),
                mode=self.config.loss_agg_mode,
                totals=totals,
                max_response_length=self.max_response_length,
            )
            if self.config.sum_norm_denominator == "micro_batch_share":
                # The packing multiplies by the rows of the micro-batch.
                weights = weights * (totals.num_rows / self.mini_batch_rows)
            weighted.append(WeightedRow(row, weights * scale, correction, replayed=replayed))
        return weighted

    def _corrections(self, rows: Sequence[Row]) -> list[torch.Tensor | None]:
        rule = self.correction
        if rule.mode == "none":
            return [None] * len(rows)
        if rule.mode == "sequence_mask":
            return self._sequence_masks(rows)
        bounds = {"cap": rule.cap, "low": rule.low, "high": rule.high}
        weights = []
        for row in rows:
            assert row.old_log_probs is not None
            mask = row.response_mask
            weights.append(off_policy_weights(row.old_log_probs, row.rollout_log_probs, mask, mode=rule.mode, **bounds))
        return list(weights)

    def _sequence_masks(self, rows: Sequence[Row]) -> list[torch.Tensor | None]:
        """All segments of a trajectory, wherever they are, share one geometric mean ratio."""
        own: dict[TrajectoryId, list[tuple[float, int]]] = {}
        for row in rows:
            assert row.old_log_probs is not None
            difference = (row.old_log_probs.double() - row.rollout_log_probs.double())[row.response_mask]
            difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            own.setdefault(row.trajectory, []).append((float(difference.sum()), len(difference)))
        parts: dict[TrajectoryId, list[tuple[float, int]]] = {}
        for leader in gather_objects(self.parallel, own if self.parallel.is_leader else {}):
            for name, values in leader.items():
                parts.setdefault(name, []).extend(values)
        masks: list[torch.Tensor | None] = []
        for row in rows:
            values = parts[row.trajectory]
            count = sum(number for _, number in values)
            ratio = math.exp(math.fsum(value for value, _ in values) / count) if count else 1.0
            keep = self.correction.low <= ratio <= self.correction.high
            masks.append(torch.where(row.response_mask, float(keep), 1.0))
        return masks

    def _rule(self, *, replayed: bool) -> SurrogateRule:
        config = self.config
        low, high = config.clip_range
        inside = config.policy_loss.cov_scope == "micro_batch"
        return SurrogateRule(
            mode=config.policy_loss.mode(replayed=replayed),
            clip_ratio_low=low,
            clip_ratio_high=high,
            clip_ratio_c=config.clip_ratio_c,
            kl_cov_coef=config.policy_loss.ppo_kl_coef,
            draw=self._cov_rule(replayed=replayed) if inside else None,
            implementation=config.kernels,
        )

    def _cov_rule(self, *, replayed: bool) -> ClipCovRule | KlCovRule | None:
        loss, suffix = self.config.policy_loss, "_replay" if replayed else ""
        mode = loss.mode(replayed=replayed)
        if mode == "kl_cov":
            return KlCovRule(ratio=getattr(loss, f"kl_cov_ratio{suffix}"))
        if mode != "clip_cov":
            return None
        low, high = self.config.clip_range
        quantiles = (loss.clip_cov_lb_quantile, loss.clip_cov_ub_quantile)
        return ClipCovRule(
            ratio=getattr(loss, f"clip_cov_ratio{suffix}"),
            lb=getattr(loss, f"clip_cov_lb{suffix}"),
            ub=getattr(loss, f"clip_cov_ub{suffix}"),
            clip_ratio_low=low,
            clip_ratio_high=high,
            quantiles=quantiles if loss.clip_cov_bounds == "quantile" else None,
        )

    def _regularise(
        self, rows: list[WeightedRow], on_policy: bool, key: UpdateKey, totals: tuple[Totals, Totals]
    ) -> tuple[list[WeightedRow], dict[str, float]]:
        """Rows with the covariance selection of the mini-batch, or with the keys of one inside the loss."""
        rules = {replayed: self._cov_rule(replayed=replayed) for replayed in (False, True)}
        active = {replayed for replayed in rules if rules[replayed] is not None and totals[replayed].num_tokens}
        if not active:
            return rows, {}
        keys = [self._token_keys(item, key) if item.replayed in active else None for item in rows]
        if self.config.policy_loss.cov_scope == "micro_batch":
            return [replace(item, token_keys=value) for item, value in zip(rows, keys, strict=True)], {}
        # Old log-probs are the current ones until the step's first update: those rows need no pass of their own.
        stale = [item.row for item in rows if item.replayed in active and (item.replayed or not on_policy)]
        current: dict[object, torch.Tensor] = {}
        if True in active or (False in active and not on_policy):
            current = {row_key(row): value for row, value in zip(stale, self.evaluate(stale), strict=True)}
        result, metrics = list(rows), dict[str, float]()
        for replayed in sorted(active):
            rule = rules[replayed]
            assert rule is not None
            members = [position for position, item in enumerate(rows) if item.replayed == replayed]
            sets = [_token_set(rows[i].row, current.get(row_key(rows[i].row)), keys[i]) for i in members]
            gather = self._gather if self.parallel.dp_size > 1 else alone
            selection = select_tokens(sets, rule, gather, self.config.kernels)
            for position, mask in zip(members, selection.masks, strict=True):
                result[position] = replace(rows[position], selected=_spread(rows[position].row, mask))
            metrics |= _cov_metrics(selection, "cov/replay_" if replayed else "cov/")
        return result, metrics

    def _token_keys(self, item: WeightedRow, key: UpdateKey) -> torch.Tensor:
        row = item.row
        base = derive_key(self.seed, "covariance", key.step, key.update, *row.trajectory, row.segment)
        return token_keys(base, len(row.ids), self.config.kernels)

    def _gather(self, own: object) -> list:
        """Values of all data-parallel ranks; the ranks of a model copy hold the same rows and count once."""
        values = gather_objects(self.parallel, (self.parallel.is_leader, own if self.parallel.is_leader else None))
        return [value for leads, value in values if leads]

    def _of_all_leaders(self, own: dict[Hashable, int]) -> list[dict[Hashable, int]]:
        return gather_objects(self.parallel, own if self.parallel.is_leader else {})


def _token_set(row: Row, current: torch.Tensor | None, keys: torch.Tensor | None) -> TokenSet:
    assert row.old_log_probs is not None and keys is not None
    mask = row.response_mask
    log_probs = row.old_log_probs if current is None else current
    return TokenSet(log_probs[mask], row.old_log_probs[mask], row.advantages[mask], keys[mask])


def _spread(row: Row, selected: torch.Tensor) -> torch.Tensor:
    """A selection among the sampled tokens as a mask over the whole row."""
    full = torch.zeros(len(row.ids), dtype=torch.bool)
    full[row.response_mask] = selected
    return full


def _cov_metrics(selection: Selection, prefix: str) -> dict[str, float]:
    return {
        f"{prefix}candidates": float(selection.num_candidates),
        f"{prefix}selected": float(selection.num_selected),
        f"{prefix}near_bound": float(selection.num_near_bound),
    }


def _used(rows: Sequence[WeightedRow]) -> dict[TrajectoryId, tuple[int, float]]:
    used: dict[TrajectoryId, tuple[int, float]] = {}
    for item in rows:
        if item.replayed and bool(item.row.response_mask.any()):
            count, weight = used.get(item.row.trajectory, (0, float(item.weights.max())))
            selected = 0 if item.selected is None else int(item.selected.sum())
            used[item.row.trajectory] = (count + selected, weight)
    return used


def merge_used(
    parts: Sequence[Mapping[TrajectoryId, tuple[int, float]]],
) -> dict[TrajectoryId, tuple[int, float]]:
    """:attr:`Objective.used` of several ranks as one; segments of a trajectory may have been on different ranks."""
    merged: dict[TrajectoryId, tuple[int, float]] = {}
    for part in parts:
        for name, (count, weight) in part.items():
            known, _ = merged.get(name, (0, weight))
            merged[name] = (known + count, weight)
    return merged
