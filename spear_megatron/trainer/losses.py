"""Loss of one micro-batch: weights are already on the tokens, so a loss is a plain sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule
from spear_megatron.algorithms.drawn_loss import drawn_policy_loss
from spear_megatron.algorithms.kl import kl_estimate
from spear_megatron.kernels.policy_loss import PolicySums, policy_loss
from spear_megatron.trainer.figures import Figures
from spear_megatron.types import MicroBatch

MicroBatchLoss = Callable[[torch.Tensor, torch.Tensor | None, MicroBatch], tuple[torch.Tensor, Figures]]
"""(log-probs [T], entropy [T] or None, micro-batch) -> (scalar loss, figures)."""

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateRule:
    """Surrogate of one row set: on-policy or replayed.

    Attributes:
        mode: vanilla, clip_cov, kl_cov or gpg.
        clip_ratio_low, clip_ratio_high, clip_ratio_c, kl_cov_coef: see :func:`policy_loss`.
        draw: covariance selection inside the loss, per micro-batch and rank, of which the type is then the mode; None
            takes ``MicroBatch.selected``.
        implementation: of the loss and of the selection: auto, compiled or eager.
    """

    mode: str
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float
    kl_cov_coef: float
    draw: ClipCovRule | KlCovRule | None = None
    implementation: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Minus J: sum w * surrogate over on-policy and replayed tokens - kl_coef * sum w * KL + entropy bonus.

    The method's joint objective J_GRPO + gamma * J_SIL: gamma and both normalisers are in the tokens' weights. The KL
    term is on on-policy tokens alone.

    Attributes:
        rule, replay_rule: surrogates of on-policy and of replayed tokens.
        entropy_weight: entropy_coeff / on-policy tokens of the optimizer step over all ranks.
        replay_entropy_weight: the same for replayed tokens, times gamma; 0 by the paper.
        kl_coef, kl_kind: KL term; 0 needs no reference.
        on_policy: take the current log-probs for the old ones of on-policy tokens (exact in a step's first update).
        engine_ratio: the old log-probs are the engine's; its drift is then measured against the current ones.
    """

    rule: SurrogateRule
    replay_rule: SurrogateRule
    entropy_weight: float = 0.0
    replay_entropy_weight: float = 0.0
    kl_coef: float = 0.0
    kl_kind: str = "low_var_kl"
    on_policy: bool = False
    engine_ratio: bool = False

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor | None, batch: MicroBatch
    ) -> tuple[torch.Tensor, Figures]:
        assert entropy is not None
        own = batch.loss_mask & ~batch.replayed
        replayed = batch.loss_mask & batch.replayed
        loss, sums, maxima = self._on_policy_part(own, log_probs, entropy, batch)
        replay_loss, replay_sums, replay_maxima = self._replay_part(replayed, log_probs, entropy, batch)
        loss = loss + replay_loss
        return loss, Figures(sums | replay_sums | {"loss": figure(loss)}, maxima | replay_maxima)

    def _on_policy_part(
        self, mask: torch.Tensor, log_probs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, Sums, Sums]:
        old_log_probs = log_probs.detach() if self.on_policy else batch.old_log_probs
        loss, policy, sums = _surrogate_loss(self.rule, mask, log_probs, old_log_probs, batch, "cov_")
        places = mask.nonzero().squeeze(1)
        correction, own_entropy = batch.surrogate_weight[places], entropy[places]
        if self.entropy_weight:
            loss = loss - self.entropy_weight * own_entropy.sum()
        sums |= {
            "pg_loss": policy.loss,
            "tokens": figure(mask),
            "entropy": figure(own_entropy),
            "clipped": policy.clipped,
            "dual_clipped": policy.dual_clipped,
            "log_ratio": policy.log_ratio,
            "correction": figure(correction),
            "dropped": figure(correction == 0),
        }
        if self.kl_coef:
            kl = kl_estimate(log_probs[places], batch.ref_log_probs[places], kind=self.kl_kind)
            kl_loss = (batch.token_weight[places] * kl).sum()
            loss = loss + self.kl_coef * kl_loss
            sums |= {"kl_loss": figure(kl_loss), "ref_kl": figure(kl)}
        own = log_probs.detach() if self.engine_ratio else old_log_probs
        differences, maxima = rollout_difference(own[places], batch.rollout_log_probs[places])
        return loss, sums | differences, maxima

    def _replay_part(
        self, mask: torch.Tensor, log_probs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, Sums, Sums]:
        if not bool(mask.any()):
            return log_probs.new_zeros(()), {}, {}
        loss, policy, sums = _surrogate_loss(
            self.replay_rule, mask, log_probs, batch.old_log_probs, batch, "cov_replay_"
        )
        if self.replay_entropy_weight:
            loss = loss - self.replay_entropy_weight * entropy[mask].sum()
        sums |= {
            "replay_pg_loss": policy.loss,
            "replay_tokens": figure(mask),
            "replay_clipped": policy.clipped,
            "replay_ratio": policy.ratio,
        }
        return loss, sums, {"replay_ratio": policy.max_ratio}


def _surrogate_loss(
    rule: SurrogateRule,
    mask: torch.Tensor,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    batch: MicroBatch,
    prefix: str,
) -> tuple[torch.Tensor, PolicySums, Sums]:
    weight = batch.token_weight * batch.surrogate_weight
    constants = {
        "clip_ratio_low": rule.clip_ratio_low,
        "clip_ratio_high": rule.clip_ratio_high,
        "kl_cov_coef": rule.kl_cov_coef,
    }
    columns = (log_probs, old_log_probs, batch.advantages, weight)
    if rule.draw is not None:
        loss, drawn, _ = drawn_policy_loss(
            *columns, batch.token_keys, rule.draw, mask=mask, **constants, implementation=rule.implementation
        )
        return loss, drawn, {
            f"{prefix}candidates": drawn.num_candidates,
            f"{prefix}near_bound": drawn.num_near_bound,
            f"{prefix}selected": drawn.num_selected,
        }
    loss, policy = policy_loss(
        *columns,
        mode=rule.mode,
        selected=batch.selected if rule.mode in ("clip_cov", "kl_cov") else None,
        mask=mask,
        clip_ratio_c=rule.clip_ratio_c,
        **constants,
        implementation=rule.implementation,
    )
    return loss, policy, {f"{prefix}selected": figure(batch.selected & mask)}


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
