"""Clipped policy surrogate.

PPO (arXiv 1707.06347), equation 7: min(r A, clip(r, 1 - eps, 1 + eps) A) with r = exp(logp - old_logp).
DAPO (arXiv 2503.14476), equation 8: separate lower and upper range ("clip-higher").
Dual clip (arXiv 1912.09729), equation 5: for A < 0 the surrogate is at least c A, c > 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_LOG_RATIO_LIMIT = 20.0


class PolicySurrogate(NamedTuple):
    """Per-token result, every tensor of the shape of the log-probs.

    Attributes:
        surrogate: float32, to be maximised; differentiable in the current log-probs.
        log_ratio: float32, logp - old_logp limited to [-20, 20], detached.
        clipped: bool, where the PPO clip is active (the token has no gradient, unless ``dual_clipped`` says why).
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
    log_ratio = torch.clamp(log_probs - old_log_probs, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    ratio = torch.exp(log_ratio)
    plain = ratio * advantages
    bounded = torch.clamp(ratio, 1.0 - clip_ratio_low, 1.0 + clip_ratio_high) * advantages
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
