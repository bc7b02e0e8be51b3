"""Correction for an engine that samples with other log-probs than the trainer computes for the same weights.

TIS, truncated importance sampling: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training" (2025): weight min(ratio, C). IcePop: Ling Team, "Small Leak Can Sink a Great Ship" (2025): the ratio inside
[low, high], 0 outside. Sequence mask, as in verl and slime: a trajectory whose geometric mean ratio leaves
[low, high] is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CORRECTION_MODES: tuple[str, ...] = ("none", "tis", "icepop", "sequence_mask")

LOG_RATIO_LIMIT = 20.0


def off_policy_weights(
    old_log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    mask: torch.Tensor,
    *,
    mode: str,
    cap: float,
    low: float,
    high: float,
    sequence: float | None = None,
) -> torch.Tensor:
    """Factor of every token's surrogate, from its ratio exp(old_logp - rollout_logp); without a gradient.

    Args:
        old_log_probs, rollout_log_probs: float32 [n], the trainer's and the engine's.
        mask: bool [n], the sampled tokens.
        mode: none 1; tis min(ratio, cap); icepop the ratio where it lies in [low, high], else 0; sequence_mask 1 on
            all tokens, or 0 on all if the geometric mean ratio leaves [low, high].
        sequence: that mean over the whole trajectory, from :func:`sequence_ratio`, for trajectories of several
            segments; None takes the mean over these tokens.

    Returns:
        float32 [n], 1 off the mask.

    Raises:
        ValueError: unknown ``mode``.
    """
    if mode not in CORRECTION_MODES:
        raise ValueError(f"algorithm.rollout_correction.mode is {mode!r}; use one of {', '.join(CORRECTION_MODES)}.")
    ratio = torch.exp(_log_ratio(old_log_probs, rollout_log_probs))
    ones = torch.ones_like(ratio)
    if mode == "tis":
        weights = torch.clamp(ratio, max=cap)
    elif mode == "icepop":
        weights = torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
    elif mode == "sequence_mask":
        if sequence is None:
            sequence = sequence_ratio([(old_log_probs, rollout_log_probs, mask)])
        weights = ones if low <= sequence <= high else torch.zeros_like(ratio)
    else:
        weights = ones
    return torch.where(mask, weights, ones)


def sequence_ratio(parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
    """Geometric mean of the ratios of all sampled tokens of one trajectory; 1 without any. Order does not matter.

    Args:
        parts: (old_log_probs float32 [n], rollout_log_probs float32 [n], mask bool [n]) of every segment.
    """
    sums = [float(_log_ratio(old[mask], rollout[mask]).sum(dtype=torch.float64)) for old, rollout, mask in parts]
    count = sum(int(mask.sum()) for _, _, mask in parts)
    return math.exp(math.fsum(sums) / count) if count else 1.0


def _log_ratio(old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor) -> torch.Tensor:
    difference = (old_log_probs - rollout_log_probs).detach().float()
    return torch.clamp(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
