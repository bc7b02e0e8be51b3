"""The gate between rollouts and update: engine and trainer must agree on the log-probs of the sampled tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from spear_megatron.algorithms.mismatch import (
    Mismatch, RowLogProbs, Sums, measure, sequence_mean, sequence_sum, worst_bucket,
)  # fmt: skip
from spear_megatron.data.batch_files import BatchInfo, BatchRow
from spear_megatron.parallel.agreement import gather_objects
from spear_megatron.parallel.errors import RunError, RunTimeout
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.config import MismatchConfig
from spear_megatron.types import Row, TrajectoryId

KEY = "actor_rollout_ref.rollout.mismatch"
CAUSES = (
    "the engine holds other weights than the trainer (a publish that failed or was left out), computes with another "
    "precision, quantisation or kernels, or samples at another temperature; a turn other than the first alone points "
    "at the text between the turns: another chat template, or tokens that were split anew"
)

SaveBatch = Callable[[BatchInfo, Sequence[BatchRow]], Path]
"""Saves a batch of all ranks and returns its folder; collective."""


class MismatchGate:
    """Measures every step, warns, masks trajectories, stops the run. Methods are collective over all ranks."""

    def __init__(self, config: MismatchConfig, parallel: ParallelState, save: SaveBatch) -> None:
        """Bind the bounds and what saves a batch."""
        self._config, self._parallel, self._save = config, parallel, save
        self._last_warned: int | None = None

    def measure(self, rows: Sequence[Row], log_probs: Sequence[torch.Tensor], version: int) -> Mismatch:
        """Figures of all ranks' rows.

        Args:
            rows: of this data-parallel rank. log_probs: float32 [n] of each, by the trainer.
            version: of the weights that computed them.
        """
        return measure(_pairs(rows, log_probs), version=version, token_bound=self._config.token_bound, gather=self._all)

    def judge(
        self, step: int, rows: Sequence[Row], log_probs: Sequence[torch.Tensor], version: int
    ) -> tuple[dict[str, float], str | None]:
        """Metrics of the step, and what to tell the user of it.

        The first of several steps in a row that warn saves its batch, and so does a step that stops. A batch that
        cannot be written is told and is no reason to stop.

        Raises:
            RunError: on every rank, where the mean difference is above ``stop``.
        """
        mismatch, config = self.measure(rows, log_probs, version), self._config
        level = mismatch["all"].abs_diff_mean
        stops = config.stop is not None and level > config.stop
        warns = config.warn is not None and level > config.warn
        metrics = {**mismatch_metrics(mismatch), "mismatch/warned": float(warns)}
        if not (stops or warns):
            return metrics, None
        name, bound = ("stop", config.stop) if stops else ("warn", config.warn)
        text = f"step {step}: {described(mismatch)}, above {KEY}.{name}={bound}"
        known = self._last_warned is not None and self._last_warned == step - 1
        self._last_warned = step
        if known and not stops:
            return metrics, text
        figures = {bucket: asdict(value) for bucket, value in mismatch.items()}
        info = BatchInfo(kind="mismatch", step=step, update=0, policy_version=version, reason=text, figures=figures)
        pairs = zip(rows, log_probs, strict=True)
        saved = self._saved(info, [BatchRow(row=row, log_probs=values) for row, values in pairs])
        if stops:
            raise RunError(f"{text}. Usual causes: {CAUSES}; {saved}")
        return metrics, f"{text}; {saved}"

    def _saved(self, info: BatchInfo, rows: Sequence[BatchRow]) -> str:
        try:
            folder = self._save(info, rows)
        except RunTimeout:  # other ranks are gone
            raise
        except (OSError, RunError) as error:  # on every rank alike
            return f"the batch could not be saved: {error}"
        return f"batch saved to {folder}: 'python -m spear_megatron replay-dump {folder}' computes it again"

    def masked(
        self, rows: Sequence[Row], log_probs: Sequence[torch.Tensor], version: int
    ) -> dict[TrajectoryId, str]:
        """The trajectories of all ranks that differ too much to be trained on, with the reason ``mismatch``."""
        bound, kind = self._config.mask, self._config.mask_by
        if bound is None:
            return {}
        own: dict[TrajectoryId, list[tuple[int, float]]] = {}
        for row, pair in zip(rows, _pairs(rows, log_probs), strict=True):
            own.setdefault(row.trajectory, []).append(sequence_sum(pair, version=version, kind=kind))
        parts: dict[TrajectoryId, list[tuple[int, float]]] = {}
        for leader in gather_objects(self._parallel, own if self._parallel.is_leader else {}):
            for name, values in leader.items():
                parts.setdefault(name, []).extend(values)
        return {name: "mismatch" for name in sorted(parts) if sequence_mean(parts[name]) > bound}

    def _all(self, own: dict[str, Sums]) -> list[dict[str, Sums]]:
        """Sums of every data-parallel rank; the ranks of a model copy hold the same rows and count once."""
        return gather_objects(self._parallel, own if self._parallel.is_leader else {})


def _pairs(rows: Sequence[Row], log_probs: Sequence[torch.Tensor]) -> list[RowLogProbs]:
    return [row_pair(row, values) for row, values in zip(rows, log_probs, strict=True)]


def row_pair(row: Row, log_probs: torch.Tensor) -> RowLogProbs:
    """The row's two log-probs, those of the trainer given (float32 [n])."""
    return RowLogProbs(
        log_probs=log_probs,
        rollout_log_probs=row.rollout_log_probs,
        mask=row.response_mask,
        policy_versions=row.policy_versions,
        first_turn=row.first_turn,
    )


def mismatch_metrics(mismatch: Mismatch) -> dict[str, float]:
    """The figures by names of the record: all of the tokens of current weights, of the buckets the mean of |d|.

    Where no token is of the current weights, what is said of them is left out: 0 would look like agreement.
    """
    total = mismatch["all"]
    metrics = {"mismatch/tokens": float(total.tokens)}
    compared = {
        "mismatch/abs_diff_mean": total.abs_diff_mean,
        "mismatch/abs_diff_max": total.abs_diff_max,
        "mismatch/k3": total.k3,
        "mismatch/ratio_mean": total.ratio_mean,
        "mismatch/ratio_max": total.ratio_max,
        "mismatch/over_bound": total.over_bound,
    }
    metrics |= compared if total.tokens else {}
    return metrics | {f"mismatch/{name}": value.abs_diff_mean for name, value in mismatch.items() if name != "all"}


def described(mismatch: Mismatch) -> str:
    """Mean and worst buckets in words, and how far older policy versions are."""
    total, places = mismatch["all"], []
    for kind in ("turn", "position"):
        name = worst_bucket(mismatch, kind)
        if name is not None:
            places.append(f"{kind} {name.removeprefix(f'{kind}_')} ({mismatch[name].abs_diff_mean:.3g})")
    text = (
        f"the engine's log-probs are {total.abs_diff_mean:.3g} nats from the trainer's on average over {total.tokens} "
        f"tokens of the current policy version, worst in {' and '.join(places)}"
    )
    older = [name for name in mismatch if name.startswith("lag_") and name != "lag_0"]
    if not older:
        return text
    means = ", ".join(f"{name.removeprefix('lag_')} behind {mismatch[name].abs_diff_mean:.3g}" for name in older)
    return f"{text}; tokens of older versions: {means}"
