"""Group-relative advantages.

DeepSeekMath (arXiv 2402.03300), section 4.1.2: A_i = (R_i - mean_g R) / std_g R over the samples of one prompt.
Dr. GRPO (arXiv 2503.20783), section 3: the same without the standard deviation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

_STD_EPSILON = 1e-6


def grpo_advantages(
    rewards: torch.Tensor, group_ids: Sequence[Hashable], valid: torch.Tensor, *, norm_by_std: bool
) -> torch.Tensor:
    """Advantage of every trajectory relative to its group.

    Groups are told apart by id, never by position, so the order of the trajectories does not matter. Trajectories that
    are not ``valid`` (infrastructure failures) enter no statistic and get 0; so does the only valid member of a group.

    Args:
        rewards: float [n], the shaped reward R_i; entries of invalid trajectories are not read.
        group_ids: n ids.
        valid: bool [n].
        norm_by_std: divide by the sample standard deviation (n - 1 in the denominator) of the group + 1e-6.

    Returns:
        float32 [n].

    Raises:
        ValueError: the three arguments differ in length, or a valid reward is not finite.
    """
    if not len(rewards) == len(group_ids) == len(valid):
        raise ValueError(
            f"{len(rewards)} rewards, {len(group_ids)} group ids and {len(valid)} flags: give one per trajectory."
        )
    values = rewards.double()
    if not bool(torch.isfinite(values[valid]).all()):
        raise ValueError("A reward is not finite; a reward function must return finite numbers.")
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(group_ids):
        if valid[position]:
            members.setdefault(group, []).append(position)
    advantages = torch.zeros(len(values), dtype=torch.float64)
    for positions in members.values():
        if len(positions) == 1:
            continue
        # Sorted sums make the statistics independent of the order in which trajectories arrived.
        group_values = values[positions].sort().values
        centred = values[positions] - group_values.mean()
        advantages[positions] = centred / (group_values.std() + _STD_EPSILON) if norm_by_std else centred
    return advantages.float()
