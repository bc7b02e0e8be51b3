"""SPEAR's two coefficients of the training step t, 1-based (arXiv 2509.22601, curriculum of section 4).

mu(t) fades the reward for tool calls out, gamma(t) fades self-imitation in; both follow half a cosine.
"""

from __future__ import annotations

import math

TOOLCALL_MODES: tuple[str, ...] = ("none", "constant", "cosine")


def toolcall_coefficient(mode: str, step: int, max_steps: int) -> float:
    """mu(t), the factor of the tool-call bonus.

    Args:
        mode: none 0; constant 1; cosine (1 + cos(pi t / T_d)) / 2 until T_d, then 0.
        step: t. max_steps: T_d, at least 1 (checked where the configuration is read).

    Raises:
        ValueError: unknown ``mode``.
    """
    if mode not in TOOLCALL_MODES:
        raise ValueError(f"algorithm.use_toolcall_reward is {mode!r}; use one of {', '.join(TOOLCALL_MODES)}.")
    if mode == "none":
        return 0.0
    if mode == "constant":
        return 1.0
    return (1.0 + math.cos(math.pi * step / max_steps)) / 2.0 if step < max_steps else 0.0


def replay_coefficient(step: int, *, coef: float, warmup_steps: int) -> float:
    """gamma(t), the factor of the self-imitation term: coef * (1 - cos(pi t / T_w)) / 2 until T_w, then coef.

    Args:
        step: t. coef: the final value c. warmup_steps: T_w, at least 1 (checked where the configuration is read).
    """
    return coef * (1.0 - math.cos(math.pi * step / warmup_steps)) / 2.0 if step < warmup_steps else coef
