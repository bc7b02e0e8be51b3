"""Loss of one micro-batch: weights are already on the tokens, so a loss is a plain sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spear_megatron.algorithms.kl import kl_estimate
from spear_megatron.algorithms.policy_loss import policy_surrogate
from spear_megatron.trainer.figures import Figures
from spear_megatron.types import MicroBatch


MicroBatchLoss = Callable[[torch.Tensor, torch.Tensor | None, MicroBatch], tuple[torch.Tensor, Figures]]
"""(log-probs [T], entropy [T] or None, micro-batch) -> (scalar loss, figures)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """J = sum w * surrogate - kl_coef * sum w * KL + entropy_coeff * mean entropy, negated.

    Attributes:
        clip_ratio_low, clip_ratio_high, clip_ratio_c: see :func:`policy_surrogate`.
        entropy_weight: entropy_coeff / sampled tokens of the optimizer step over all ranks.
        kl_coef, kl_kind: KL term; 0 needs no reference.
        on_policy: take the current log-probs for the old ones (exact in the first update of a step).
    """

    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float
    entropy_weight: float = 0.0
    kl_coef: float = 0.0
    kl_kind: str = "low_var_kl"
    on_policy: bool = False

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor | None, batch: MicroBatch
    ) -> tuple[torch.Tensor, Figures]:
        assert entropy is not None
        mask = batch.loss_mask
        log_probs, entropy, weight = log_probs[mask], entropy[mask], batch.token_weight[mask]
        old_log_probs = log_probs.detach() if self.on_policy else batch.old_log_probs[mask]
        policy = policy_surrogate(
            log_probs,
            old_log_probs,
            batch.advantages[mask],
            clip_ratio_low=self.clip_ratio_low,
            clip_ratio_high=self.clip_ratio_high,
            clip_ratio_c=self.clip_ratio_c,
        )
        pg_loss = -(weight * policy.surrogate).sum()
        loss = pg_loss - self.entropy_weight * entropy.sum() if self.entropy_weight else pg_loss
        sums = {
            "pg_loss": figure(pg_loss),
            "tokens": figure(mask),
            "entropy": figure(entropy),
            "clipped": figure(policy.clipped),
            "dual_clipped": figure(policy.dual_clipped),
            "log_ratio": figure(policy.log_ratio),
        }
        if self.kl_coef:
            kl = kl_estimate(log_probs, batch.ref_log_probs[mask], kind=self.kl_kind)
            kl_loss = (weight * kl).sum()
            loss = loss + self.kl_coef * kl_loss
            sums |= {"kl_loss": figure(kl_loss), "ref_kl": figure(kl)}
        sums["loss"] = figure(loss)
        differences, maxima = rollout_difference(old_log_probs, batch.rollout_log_probs[mask])
        return loss, Figures(sums | differences, maxima)


def supervised_loss(
    log_probs: torch.Tensor, entropy: torch.Tensor | None, batch: MicroBatch
) -> tuple[torch.Tensor, Figures]:
    """Masked cross-entropy, sum w * -log p; with weights 1 / tokens it is the mean over all tokens to learn."""
    loss = -(batch.token_weight * log_probs)[batch.loss_mask].sum()
    return loss, Figures({"loss": figure(loss), "tokens": figure(batch.loss_mask)}, {})


def rollout_difference(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """How far the engine's log-probs are from the trainer's, both float32 [m] of sampled tokens: (sums, maxima)."""
    log_difference = (log_probs - rollout_log_probs).abs()
    difference = (log_probs.exp() - rollout_log_probs.exp()).abs()
    sums = {"rollout_log_probs_diff": figure(log_difference), "rollout_probs_diff": figure(difference)}
    largest = log_difference.detach().double().max() if len(log_difference) else torch.zeros((), dtype=torch.float64)
    return sums, {"rollout_log_probs_diff": largest}


def figure(values: torch.Tensor) -> torch.Tensor:
    """Detached float64 sum."""
    return values.detach().sum(dtype=torch.float64)
