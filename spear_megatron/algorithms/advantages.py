"""One advantage per trajectory, from the rewards of a step.

GRPO: DeepSeekMath (arXiv 2402.03300), section 4.1.2: A_i = (R_i - mean_g R) / std_g R over the samples of one prompt.
Dr. GRPO (arXiv 2503.20783), section 3: the same without the standard deviation.
RLOO (arXiv 2402.14740): A_i = R_i minus the mean of the group's other members.
REINFORCE++ (arXiv 2501.03262): no groups; rewards are whitened over all tokens of the step.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch

from spear_megatron.algorithms.moments import deviations

STD_EPSILON = 1e-6
"""Added to every standard deviation that divides an advantage."""


def grpo_advantages(
    rewards: torch.Tensor,
    group_ids: Sequence[Hashable],
    valid: torch.Tensor,
    *,
    norm_by_std: bool,
    singleton: str = "zero",
) -> torch.Tensor:
    """Advantage of every trajectory relative to its group.

    Groups are told apart by id, never by position, so the order of the trajectories does not matter. Trajectories that
    are not ``valid`` (infrastructure failures) enter no statistic and get 0.

    Args:
        rewards: float [n], the shaped reward R_i; entries of invalid trajectories are not read.
        group_ids: n ids.
        valid: bool [n].
        norm_by_std: divide by the sample standard deviation (n - 1 in the denominator) of the group + 1e-6.
        singleton: what the only valid member of a group gets: zero, or its reward as in SPEAR's released code.

    Returns:
        float32 [n].

    Raises:
        ValueError: the three arguments differ in length, a valid reward is not finite, or ``singleton`` is unknown.
    """
    values, members = _grouped(rewards, group_ids, valid, singleton)
    advantages = [0.0] * len(values)
    for positions in members:
        if len(positions) == 1:
            advantages[positions[0]] = values[positions[0]] if singleton == "reward" else 0.0
            continue
        centred, std = deviations([values[position] for position in positions])
        for position, value in zip(positions, centred, strict=True):
            advantages[position] = value / (std + STD_EPSILON) if norm_by_std else value
    return torch.tensor(advantages, dtype=torch.float32)


def rloo_advantages(
    rewards: torch.Tensor, group_ids: Sequence[Hashable], valid: torch.Tensor, *, singleton: str = "zero"
) -> torch.Tensor:
    """Advantage of every trajectory against the mean of the other valid members of its group.

    Arguments, result and errors as in :func:`grpo_advantages`. R_i minus the mean of the n - 1 others is
    n / (n - 1) times R_i minus the mean of all.
    """
    values, members = _grouped(rewards, group_ids, valid, singleton)
    advantages = [0.0] * len(values)
    for positions in members:
        if len(positions) == 1:
            advantages[positions[0]] = values[positions[0]] if singleton == "reward" else 0.0
            continue
        scale = len(positions) / (len(positions) - 1)
        centred, _ = deviations([values[position] for position in positions])
        for position, value in zip(positions, centred, strict=True):
            advantages[position] = scale * value
    return torch.tensor(advantages, dtype=torch.float32)


def reinforce_plus_plus_advantages(
    rewards: torch.Tensor, num_tokens: Sequence[int], valid: torch.Tensor
) -> torch.Tensor:
    """Whitened rewards: (R_i - mean) / (std + 1e-6) over all sampled tokens of the step, with a discount of 1.

    With that discount every token of a trajectory has the return R_i, so mean and sample standard deviation weigh a
    trajectory by its sampled tokens. Fewer than two tokens, or equal rewards, give 0.

    Args:
        rewards: float [n]; entries of invalid trajectories are not read.
        num_tokens: sampled tokens of each trajectory, over all its segments.
        valid: bool [n]; the others enter no statistic and get 0.

    Returns:
        float32 [n].

    Raises:
        ValueError: the three arguments differ in length, or a valid reward is not finite.
    """
    if not len(rewards) == len(num_tokens) == len(valid):
        raise ValueError(
            f"{len(rewards)} rewards, {len(num_tokens)} lengths and {len(valid)} flags: give one per trajectory."
        )
    values = _finite(rewards, valid)
    used = [position for position in range(len(values)) if valid[position]]
    total = sum(num_tokens[position] for position in used)
    counted = {values[position] for position in used if num_tokens[position]}
    advantages = [0.0] * len(values)
    if total < 2 or len(counted) < 2:
        return torch.tensor(advantages, dtype=torch.float32)
    mean = math.fsum(num_tokens[position] * values[position] for position in used) / total
    squares = math.fsum(num_tokens[position] * (values[position] - mean) ** 2 for position in used)
    std = math.sqrt(squares / (total - 1))
    for position in used:
        advantages[position] = (values[position] - mean) / (std + STD_EPSILON)
    return torch.tensor(advantages, dtype=torch.float32)


def _grouped(
    rewards: torch.Tensor, group_ids: Sequence[Hashable], valid: torch.Tensor, singleton: str
) -> tuple[list[float], list[list[int]]]:
    """Checked rewards, and the positions of the valid members of every group."""
    if not len(rewards) == len(group_ids) == len(valid):
        raise ValueError(
            f"{len(rewards)} rewards, {len(group_ids)} group ids and {len(valid)} flags: give one per trajectory."
        )
    if singleton not in ("zero", "reward"):
        raise ValueError(f"algorithm.singleton_advantage is {singleton!r}; use zero or reward.")
    values = _finite(rewards, valid)
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(group_ids):
        if valid[position]:
            members.setdefault(group, []).append(position)
    return values, list(members.values())


def _finite(rewards: torch.Tensor, valid: torch.Tensor) -> list[float]:
    if not bool(torch.isfinite(rewards[valid]).all()):
        raise ValueError("A reward is not finite; a reward function must return finite numbers.")
    return rewards.double().tolist()
