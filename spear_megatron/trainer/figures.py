"""Figures of one step that add up, or are maximised, over micro-batches and data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.state import ParallelState


@dataclass(frozen=True, slots=True)
class Figures:
    """Detached scalars (float64) by name: ``sums`` add up, of ``maxima`` the largest counts."""

    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Figures of a whole optimizer step as numbers, equal on every rank."""

    sums: dict[str, float]
    maxima: dict[str, float]

    def mean(self, name: str, per: str = "tokens") -> float:
        """Sum of ``name`` per sampled token (or per ``replay_tokens``), 0 without any."""
        return self.sums[name] / max(self.sums[per], 1.0)


def reduce_figures(parts: Sequence[Figures], parallel: ParallelState) -> StepFigures:
    """Combine all micro-batches of all data-parallel ranks; collective over every rank.

    ``parts`` come from the last pipeline stage; its tensor-parallel copies count once, context-parallel ranks hold
    tokens of their own. Sums run in rank order, so every
    rank gets the same bits.
    """
    own: tuple[dict[str, float], dict[str, float]] = ({}, {})
    if parallel.is_last_stage and parallel.tp_rank == 0:
        own = _merge([(_numbers(part.sums), _numbers(part.maxima)) for part in parts])
    return StepFigures(*_merge(gather_objects(parallel, own)))


def _numbers(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _merge(parts: Sequence[tuple[dict[str, float], dict[str, float]]]) -> tuple[dict[str, float], dict[str, float]]:
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for part_sums, part_maxima in parts:
        for name, value in part_sums.items():
            sums[name] = sums.get(name, 0.0) + value
        for name, value in part_maxima.items():
            # A NaN must survive the maximum.
            known = maxima.get(name, value)
            maxima[name] = value if value != value or value > known else known
    return sums, maxima


def policy_metrics(figures: StepFigures, norm: float, lr: float) -> dict[str, float]:
    """Metrics of one policy update, by the names of the record; those of a term without tokens stay away."""
    sums = figures.sums
    metrics: dict[str, float] = {}
    if sums.get("tokens"):
        metrics = {
            "actor/loss": sums["loss"],
            "actor/grad_norm": norm,
            "actor/lr": lr,
            "actor/pg_loss": sums["pg_loss"],
            "actor/entropy": figures.mean("entropy"),
            "actor/pg_clipfrac": figures.mean("clipped"),
            "actor/pg_clipfrac_lower": figures.mean("dual_clipped"),
            "actor/ppo_kl": -figures.mean("log_ratio"),
            "actor/tokens": sums["tokens"],
            "correction/weight_mean": figures.mean("correction"),
            "correction/dropped": figures.mean("dropped"),
            **rollout_metrics(figures),
        }
    if "kl_loss" in sums and sums["tokens"]:
        metrics["actor/kl_loss"] = sums["kl_loss"]
        metrics["actor/ref_kl"] = figures.mean("ref_kl")
    if sums.get("replay_tokens"):
        if not metrics:  # an optimizer step on replayed trajectories alone
            metrics = {"replay/grad_norm": norm}
        metrics |= {
            "replay/pg_loss": sums["replay_pg_loss"],
            "replay/clipfrac": figures.mean("replay_clipped", "replay_tokens"),
            "replay/ratio_mean": figures.mean("replay_ratio", "replay_tokens"),
            "replay/ratio_max": figures.maxima["replay_ratio"],
            "replay/tokens": sums["replay_tokens"],
        }
    for term in ("cov", "cov_replay"):
        if f"{term}_candidates" in sums:
            names = ("candidates", "selected", "near_bound")
            prefix = term.replace("cov_replay", "cov/replay_") if term != "cov" else "cov/"
            metrics |= {f"{prefix}{name}": sums[f"{term}_{name}"] for name in names}
    return metrics


def rollout_metrics(figures: StepFigures) -> dict[str, float]:
    """How far engine and trainer are apart in the log-probs of the sampled tokens."""
    return {
        "training/rollout_logp_abs_diff/mean": figures.mean("rollout_log_probs_diff"),
        "training/rollout_logp_abs_diff/max": figures.maxima.get("rollout_log_probs_diff", 0.0),
        "training/rollout_probs_diff/mean": figures.mean("rollout_probs_diff"),
    }
