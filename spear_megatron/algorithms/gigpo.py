"""Step-level advantages of GiGPO (arXiv 2505.10978, section 4.2): steps from the same state compare with each other.

Within one task group, all steps that saw the same observation (the anchor) form a group; their discounted returns are
normalised there. The episode-level term is GRPO's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from spear_megatron.algorithms.advantages import STD_EPSILON
from spear_megatron.algorithms.moments import deviations

STEP_MODES: tuple[str, ...] = ("mean_norm", "mean_std_norm")


def step_returns(rewards: Sequence[float], gamma: float) -> list[float]:
    """Discounted return of every step of one trajectory, G_t = r_t + gamma G_(t+1), in step order.

    Args:
        rewards: the environment's reward of each step. gamma: discount per step.
    """
    returns: list[float] = []
    following = 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return returns[::-1]


def step_advantages(
    returns: Sequence[float], anchors: Sequence[tuple[Hashable, Hashable]], *, mode: str
) -> list[float]:
    """Advantage of every step relative to the steps that share its anchor; the order of the steps does not matter.

    Args:
        returns: G of each step, of all trajectories of the step's task groups.
        anchors: (task group, key of the observation) of each step; equal pairs form a step group.
        mode: mean_norm subtracts the step group's mean; mean_std_norm also divides by its sample standard deviation
            (n - 1 in the denominator) + 1e-6.

    Returns:
        One number per step; 0 for a step that is alone in its step group.

    Raises:
        ValueError: unknown ``mode``, or the arguments differ in length.
    """
    if mode not in STEP_MODES:
        raise ValueError(f"algorithm.gigpo.mode is {mode!r}; use one of {', '.join(STEP_MODES)}.")
    if len(returns) != len(anchors):
        raise ValueError(f"{len(returns)} returns and {len(anchors)} anchors: give one per step.")
    members: dict[tuple[Hashable, Hashable], list[int]] = {}
    for position, anchor in enumerate(anchors):
        members.setdefault(anchor, []).append(position)
    advantages = [0.0] * len(returns)
    for positions in members.values():
        centred, std = deviations([returns[position] for position in positions])
        for position, value in zip(positions, centred, strict=True):
            advantages[position] = value / (std + STD_EPSILON) if mode == "mean_std_norm" else value
    return advantages
