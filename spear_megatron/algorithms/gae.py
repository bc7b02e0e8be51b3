"""Generalised advantage estimation (arXiv 1506.02438, equations 11 to 16) over the tokens that a policy sampled."""

from __future__ import annotations

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of one sequence.

    Tokens off the mask (prompt, tool output, observations) are no actions: the state after a sampled token is the one
    before the next sampled token, however many others lie between. The sequence ends in a terminal state of value 0.

    Args:
        rewards: float [n], read on the mask only. values: float [n], V before each token, read on the mask only.
        mask: bool [n], the sampled tokens.
        gamma: discount per sampled token. lam: lambda; 0 is the one-step error, 1 the Monte Carlo return minus V.

    Returns:
        (advantages, returns): float32 [n], 0 off the mask; returns are advantages + values.
    """
    token_rewards, token_values = rewards[mask].tolist(), values[mask].tolist()
    found = [0.0] * len(token_values)
    advantage = next_value = 0.0
    for position in reversed(range(len(token_values))):
        error = token_rewards[position] + gamma * next_value - token_values[position]
        advantage = error + gamma * lam * advantage
        next_value = token_values[position]
        found[position] = advantage
    advantages = torch.zeros(len(mask), dtype=torch.float32)
    returns = torch.zeros(len(mask), dtype=torch.float32)
    advantages[mask.cpu()] = torch.tensor(found, dtype=torch.float32)
    totals = [a + v for a, v in zip(found, token_values, strict=True)]
    returns[mask.cpu()] = torch.tensor(totals, dtype=torch.float32)
    return advantages.to(values.device), returns.to(values.device)
