"""Per-token estimators of KL(policy || reference).

J. Schulman, "Approximating KL divergence" (2020): with x sampled from the policy and r = p_ref(x) / p(x),
k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r.
"""

from __future__ import annotations

import torch

KL_KINDS: tuple[str, ...] = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
"""Accepted names: ``kl`` is k1, ``mse`` is k2, ``low_var_kl`` is k3; ``abs`` is |log r|."""

_LOG_RATIO_LIMIT = 20.0
_K3_LIMIT = 10.0


def check_kl_kind(key: str, kind: str) -> None:
    """Raise ValueError naming the configuration ``key`` when ``kind`` is not one of :data:`KL_KINDS`."""
    if kind not in KL_KINDS:
        raise ValueError(f"{key} is {kind!r}; use one of {', '.join(KL_KINDS)}.")


def kl_estimate(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, *, kind: str) -> torch.Tensor:
    """Estimate the KL divergence at every token.

    Args:
        log_probs, ref_log_probs: float32 [...], of the same tokens.
        kind: a name of :data:`KL_KINDS`.

    Returns:
        float32 [...], differentiable in ``log_probs``. k3 is limited to [-10, 10] and its log ratio to [-20, 20], so
        that one token can not overflow the sum.

    Raises:
        ValueError: unknown ``kind``.
    """
    check_kl_kind("kind", kind)
    log_ratio = log_probs - ref_log_probs
    if kind in ("kl", "k1"):
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind in ("mse", "k2"):
        return 0.5 * log_ratio.square()
    negative = torch.clamp(-log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return torch.clamp(torch.exp(negative) - negative - 1.0, -_K3_LIMIT, _K3_LIMIT)


def kl_penalty_in_reward(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask: torch.Tensor, *, kind: str, coef: float
) -> float:
    """What ``use_kl_in_reward`` subtracts from a trajectory's reward for one of its rows.

    Args:
        log_probs, ref_log_probs: float32 [n], trainer and reference log-probs of the row's tokens.
        mask: bool [n], the sampled tokens.
        kind: estimator, a name of :data:`KL_KINDS`. coef: ``algorithm.kl_ctrl.kl_coef``.

    Returns:
        coef * sum over sampled tokens of the estimate (InstructGPT, arXiv 2203.02155, equation 2).
    """
    estimate = kl_estimate(log_probs, ref_log_probs, kind=kind)
    return coef * float(estimate[mask].sum(dtype=torch.float64))
