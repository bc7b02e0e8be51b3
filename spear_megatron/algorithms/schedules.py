"""SPEAR's two coefficients of the training step t, 1-based (arXiv 2509.22601, curriculum of section 4).

mu(t) fades the reward for tool calls out, gamma(t) fades self-imitation in; both follow half a cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

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


class Curriculum(Protocol):
    """Both coefficients of a step: what the training loop asks, whatever makes them (a schedule, or feedback)."""

    def mu(self, step: int) -> float:
        """Coefficient of the tool-call reward at the 1-based ``step``."""
        ...

    def gamma(self, step: int) -> float:
        """Coefficient of self-imitation at the 1-based ``step``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledCurriculum:
    """The paper's curriculum: functions of the step alone.

    Attributes:
        mode, max_steps: of :func:`toolcall_coefficient`.
        coef, warmup_steps: of :func:`replay_coefficient`.
    """

    mode: str = "none"
    max_steps: int = 1
    coef: float = 0.0
    warmup_steps: int = 1

    def mu(self, step: int) -> float:
        """See :func:`toolcall_coefficient`."""
        return toolcall_coefficient(self.mode, step, self.max_steps)

    def gamma(self, step: int) -> float:
        """See :func:`replay_coefficient`."""
        return replay_coefficient(step, coef=self.coef, warmup_steps=self.warmup_steps)
