"""Loss of one micro-batch: weights are already on the tokens, so a loss is a plain sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, TokenSet, select_tokens
from spear_megatron.algorithms.kl import kl_estimate
from spear_megatron.algorithms.policy_loss import PolicySurrogate, token_surrogate
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
        clip_ratio_low, clip_ratio_high, clip_ratio_c, kl_cov_coef: see :func:`token_surrogate`.
        draw: covariance selection inside the loss, per micro-batch and rank; None takes ``MicroBatch.selected``.
    """

    mode: str
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float
    kl_cov_coef: float
    draw: ClipCovRule | KlCovRule | None = None


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The sampled tokens of one row set of a micro-batch, every tensor [m]."""

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    weight: torch.Tensor
    correction: torch.Tensor
    selected: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, log_probs: torch.Tensor, batch: MicroBatch, on_policy: bool = False) -> _Tokens:
        current = log_probs[mask]
        return cls(
            log_probs=current,
            old_log_probs=current.detach() if on_policy else batch.old_log_probs[mask],
            advantages=batch.advantages[mask],
            weight=batch.token_weight[mask],
            correction=batch.surrogate_weight[mask],
            selected=batch.selected[mask],
            keys=batch.token_keys[mask],
        )


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
        tokens = _Tokens.of(mask, log_probs, batch, self.on_policy)
        policy, sums = _surrogate(self.rule, tokens, "cov_")
        loss = pg_loss = -(tokens.weight * tokens.correction * policy.surrogate).sum()
        if self.entropy_weight:
            loss = loss - self.entropy_weight * entropy[mask].sum()
        sums |= {
            "pg_loss": figure(pg_loss),
            "tokens": figure(mask),
            "entropy": figure(entropy[mask]),
            "clipped": figure(policy.clipped),
            "dual_clipped": figure(policy.dual_clipped),
            "log_ratio": figure(policy.log_ratio),
            "correction": figure(tokens.correction),
            "dropped": figure(tokens.correction == 0),
        }
        if self.kl_coef:
            kl = kl_estimate(tokens.log_probs, batch.ref_log_probs[mask], kind=self.kl_kind)
            kl_loss = (tokens.weight * kl).sum()
            loss = loss + self.kl_coef * kl_loss
            sums |= {"kl_loss": figure(kl_loss), "ref_kl": figure(kl)}
        own = tokens.log_probs.detach() if self.engine_ratio else tokens.old_log_probs
        differences, maxima = rollout_difference(own, batch.rollout_log_probs[mask])
        return loss, sums | differences, maxima

    def _replay_part(
        self, mask: torch.Tensor, log_probs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, Sums, Sums]:
        if not bool(mask.any()):
            return log_probs.new_zeros(()), {}, {}
        tokens = _Tokens.of(mask, log_probs, batch)
        policy, sums = _surrogate(self.replay_rule, tokens, "cov_replay_")
        loss = pg_loss = -(tokens.weight * tokens.correction * policy.surrogate).sum()
        if self.replay_entropy_weight:
            loss = loss - self.replay_entropy_weight * entropy[mask].sum()
        ratio = policy.log_ratio.double().exp()
        sums |= {
            "replay_pg_loss": figure(pg_loss),
            "replay_tokens": figure(mask),
            "replay_clipped": figure(policy.clipped),
            "replay_ratio": figure(ratio),
        }
        return loss, sums, {"replay_ratio": ratio.max()}


def _surrogate(rule: SurrogateRule, tokens: _Tokens, prefix: str) -> tuple[PolicySurrogate, Sums]:
    selected, sums = tokens.selected, {}
    if rule.draw is not None:
        own = TokenSet(tokens.log_probs.detach(), tokens.old_log_probs, tokens.advantages, tokens.keys)
        drawn = select_tokens([own], rule.draw)
        selected = drawn.masks[0].to(selected.device)
        counts = {"candidates": drawn.num_candidates, "near_bound": drawn.num_near_bound}
        sums = {f"{prefix}{name}": torch.tensor(float(count), dtype=torch.float64) for name, count in counts.items()}
    policy = token_surrogate(
        rule.mode,
        tokens.log_probs,
        tokens.old_log_probs,
        tokens.advantages,
        selected=selected if rule.mode in ("clip_cov", "kl_cov") else None,
        clip_ratio_low=rule.clip_ratio_low,
        clip_ratio_high=rule.clip_ratio_high,
        clip_ratio_c=rule.clip_ratio_c,
        kl_cov_coef=rule.kl_cov_coef,
    )
    return policy, sums | {f"{prefix}selected": figure(selected)}


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
