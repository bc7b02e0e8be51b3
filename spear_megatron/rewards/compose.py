"""From reward parts to the one number that advantages compare (method: R_i = S_i + p_i)."""

from __future__ import annotations

from spear_megatron.types import RewardParts


def shaped_reward(parts: RewardParts) -> float:
    """Outcome plus penalties of one trajectory; the parts themselves stay as they are."""
    return parts.outcome + parts.penalty
