"""Policy surrogates: clipped (PPO), plain policy gradient (GPG), and the two that regularise by covariance.

PPO (arXiv 1707.06347), equation 7: min(r A, clip(r, 1 - eps, 1 + eps) A) with r = exp(logp - old_logp).
DAPO (arXiv 2503.14476), equation 8: separate lower and upper range ("clip-higher").
Dual clip (arXiv 1912.09729), equation 5: for A < 0 the surrogate is at least c A, c > 1.
GPG (arXiv 2504.02546), equation 2: logp A.
Clip-Cov and KL-Cov (arXiv 2505.22617, section 4): tokens chosen by :mod:`spear_megatron.algorithms.covariance` lose
their gradient, or pay for moving.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SURROGATE_MODES: tuple[str, ...] = ("vanilla", "gpg", "clip_cov", "kl_cov")

_LOG_RATIO_LIMIT = 20.0


class PolicySurrogate(NamedTuple):
    """Per-token result, every tensor of the shape of the log-probs.

    Attributes:
        surrogate: float32, to be maximised; differentiable in the current log-probs.
        log_ratio: float32, logp - old_logp limited to [-20, 20], detached; NaN where the difference is not finite.
        clipped: bool, where the PPO clip is active (the token has no gradient, unless ``dual_clipped`` says why);
            nowhere in the modes without one.
        dual_clipped: bool, where the dual clip is active.
    """

    surrogate: torch.Tensor
    log_ratio: torch.Tensor
    clipped: torch.Tensor
    dual_clipped: torch.Tensor


def policy_surrogate(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
) -> PolicySurrogate:
    """Surrogate objective of every token; the caller masks, weighs and sums.

    Keep masks, off-policy weights and normalisers are factors on ``surrogate`` and belong to the caller.

    Args:
        log_probs: float32 [...], current policy. old_log_probs: float32 [...], before the step's first update.
        advantages: float32 [...].
        clip_ratio_low, clip_ratio_high: the ratio is clipped to [1 - low, 1 + high].
        clip_ratio_c: dual-clip bound c > 1 (checked where the configuration is read).
    """
    log_ratio = _log_ratio(log_probs, old_log_probs)
    plain, bounded = _plain_and_bounded(log_ratio, advantages, clip_ratio_low, clip_ratio_high)
    surrogate = torch.minimum(plain, bounded)
    floor = clip_ratio_c * advantages
    negative = advantages < 0
    dual_clipped = negative & (surrogate < floor)
    return PolicySurrogate(
        surrogate=torch.where(dual_clipped, floor, surrogate),
        log_ratio=log_ratio.detach(),
        clipped=bounded.detach() < plain.detach(),
        dual_clipped=dual_clipped,
    )


def token_surrogate(
    mode: str,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    selected: torch.Tensor | None,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
    kl_cov_coef: float,
) -> PolicySurrogate:
    """Surrogate objective of every token in any loss mode; the caller masks, weighs and sums.

    With r = exp(logp - old_logp), its logarithm limited to [-20, 20]:
    vanilla, :func:`policy_surrogate`; gpg, logp A; clip_cov, min(r A, clip(r) A) without dual clip, and 0 without
    gradient on selected tokens, which stay in every denominator; kl_cov, r A without any clip, minus
    kl_cov_coef |log r| on selected tokens.

    Args:
        mode: a name of :data:`SURROGATE_MODES`.
        log_probs, old_log_probs, advantages: float32 [...].
        selected: bool [...], the tokens chosen by covariance; None in the modes that choose none.
        clip_ratio_low, clip_ratio_high, clip_ratio_c: see :func:`policy_surrogate`.
        kl_cov_coef: ``actor_rollout_ref.actor.policy_loss.ppo_kl_coef``.

    Raises:
        ValueError: unknown ``mode``, or ``selected`` is given where it has no meaning or missing where it has.
    """
    check_mode(mode, selected)
    if mode == "vanilla":
        return policy_surrogate(
            log_probs,
            old_log_probs,
            advantages,
            clip_ratio_low=clip_ratio_low,
            clip_ratio_high=clip_ratio_high,
            clip_ratio_c=clip_ratio_c,
        )
    log_ratio = _log_ratio(log_probs, old_log_probs)
    nowhere = torch.zeros_like(log_ratio, dtype=torch.bool)
    clipped = nowhere
    if mode == "gpg":
        surrogate = log_probs * advantages
    elif mode == "clip_cov":
        plain, bounded = _plain_and_bounded(log_ratio, advantages, clip_ratio_low, clip_ratio_high)
        none = ((log_ratio - log_ratio) * advantages).detach()  # 0, or NaN where a token's value is not finite
        surrogate = torch.where(selected, none, torch.minimum(plain, bounded))
        clipped = bounded.detach() < plain.detach()
    else:
        surrogate = torch.exp(log_ratio) * advantages
        surrogate = torch.where(selected, surrogate - kl_cov_coef * log_ratio.abs(), surrogate)
    return PolicySurrogate(surrogate, log_ratio.detach(), clipped, dual_clipped=nowhere)


def check_mode(mode: str, selected: torch.Tensor | None) -> None:
    """ValueError for a mode that does not exist, or if ``selected`` is given where it has no meaning or missing."""
    if mode not in SURROGATE_MODES:
        raise ValueError(f"The surrogate {mode!r} is unknown; use one of {', '.join(SURROGATE_MODES)}.")
    by_covariance = mode in ("clip_cov", "kl_cov")
    if by_covariance != (selected is not None):
        raise ValueError(f"The surrogate {mode} {'needs' if by_covariance else 'takes no'} selected tokens.")


def _log_ratio(log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    difference = log_probs - old_log_probs
    limited = torch.clamp(difference, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    # The limit would turn an infinite log-prob into an ordinary ratio; a broken one must reach the loss.
    return torch.where(difference.detach().isfinite(), limited, torch.nan)


def _plain_and_bounded(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip_ratio_low: float, clip_ratio_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """r A and clip(r) A."""
    ratio = torch.exp(log_ratio)
    return ratio * advantages, torch.clamp(ratio, 1.0 - clip_ratio_low, 1.0 + clip_ratio_high) * advantages
