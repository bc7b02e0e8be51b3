"""One optimizer step with self-imitation on a tiny model: what tests of J_GRPO + gamma * J_SIL compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from train_step import BASELINE, Layout, build_actor, make_rows, share_of_rank

from spear_megatron.types import Row, TrajectoryId

GAMMA = 0.35
COV: dict[str, Any] = {
    "loss_mode": "clip-cov",
    "clip_cov_ratio": 0.05,
    "clip_cov_lb": 0.05,
    "clip_cov_ub": 3.0,
    "clip_cov_ratio_replay": 0.1,
    "clip_cov_lb_replay": -0.5,
    "clip_cov_ub_replay": 2.0,
    "kl_cov_ratio": 0.05,
    "kl_cov_ratio_replay": 0.1,
    "ppo_kl_coef": 0.7,
}


def replay_rows(count: int = 9, seed: int = 5) -> list[Row]:
    """Rows of earlier steps with positive advantages; two of them are segments of one trajectory."""
    rows = []
    for row in make_rows(count + 2, seed)[2:]:
        old = TrajectoryId(-3, row.trajectory.task, row.trajectory.sample)
        rows.append(replace(row, trajectory=old, advantages=row.advantages.abs()))
    return rows


def noisy(actor: Any, rows: list[Row], size: float) -> list[Row]:
    """Rows whose old log-probs lie around the model's and whose engine log-probs lie around those, by a noise that
    belongs to the row."""
    result = []
    for row in actor.log_probs(rows)[0]:
        generator = torch.Generator().manual_seed(1000 + 100 * row.trajectory.task + row.trajectory.sample)
        noise = size * torch.randn(2, len(row.ids), generator=generator) * row.response_mask
        old = row.old_log_probs + noise[0]
        result.append(replace(row, old_log_probs=old, rollout_log_probs=old + noise[1]))
    return result


def spear_step_on_rank(folder: str, layout: Layout, loss: dict[str, Any], fields: dict[str, Any]) -> dict | None:
    """On the first rank: loss, gradient norm, gradients, metrics, and the selected tokens of every row of all ranks."""
    from spear_megatron.algorithms.config import PolicyLossConfig, RolloutCorrectionConfig
    from spear_megatron.model.hf_io import iter_hf_tensors
    from spear_megatron.parallel.agreement import gather_objects
    from spear_megatron.trainer.objective import ReplayTerm, UpdateKey

    correction = RolloutCorrectionConfig(**fields.pop("correction", {}))
    config = {"policy_loss": PolicyLossConfig(**loss), **fields}
    actor, shape, parallel = build_actor(folder, layout, correction=correction, **config)
    rows = noisy(actor, share_of_rank(make_rows(), parallel), 0.3)
    replay = ReplayTerm(rows=noisy(actor, share_of_rank(replay_rows(), parallel), 0.3), coefficient=GAMMA)
    key = UpdateKey(step=4, update=1)
    objective, figures, norm = actor.policy_gradients(rows, replay=replay, key=key)
    gradients = {name: tensor for name, tensor in iter_hf_tensors(actor.chunks, shape, parallel, kind="main_grad")}
    chosen = {
        (item.row.trajectory, item.row.segment): item.selected.nonzero().flatten().tolist()
        for item in objective.rows
        if item.selected is not None and parallel.is_leader
    }
    selected = {name: value for part in gather_objects(parallel, chosen) for name, value in part.items()}
    result = actor.update(rows, replay=replay, key=key)
    if parallel.rank != 0:
        return None
    return {
        "loss": figures.sums["loss"],
        "figures": figures.sums,
        "grad_norm": norm,
        "gradients": gradients,
        "selected": selected,
        "update": result.metrics,
        "skipped": result.skipped,
    }


__all__ = ["BASELINE", "COV", "GAMMA", "noisy", "replay_rows", "spear_step_on_rank"]
