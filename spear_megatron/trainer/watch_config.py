"""Settings of what watches a long run: ``trainer.loss_spike`` and ``trainer.profile``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LossSpikeConfig:
    """``trainer.loss_spike``: an optimizer step whose gradient norm or loss is far above the usual."""

    action: Literal["off", "warn", "skip", "stop"] = "warn"
    """off; warn: say so; skip: leave the update out; stop: leave it out, save after the step and end with an error."""
    metric: Literal["grad_norm", "loss"] = "grad_norm"
    """What is compared: the gradient norm before clipping, or the absolute value of the loss."""
    factor: float = 10.0
    """A spike is more than this many times the running median."""
    window: int = 64
    """Optimizer steps of the running median; it judges from a quarter of them on, at least 4."""
    patience: int = 1
    """Spikes in a row before anything is done."""

    def __post_init__(self) -> None:
        if not 1 < self.factor < math.inf:
            raise ValueError(f"trainer.loss_spike.factor must be greater than 1, got {self.factor}")
        if self.window < 4:
            raise ValueError(f"trainer.loss_spike.window must be at least 4 optimizer steps, got {self.window}")
        if self.patience < 1:
            raise ValueError(f"trainer.loss_spike.patience must be at least 1, got {self.patience}")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """``trainer.profile``: a window of steps recorded with torch.profiler."""

    steps: tuple[int, ...] = ()
    """Two numbers a, b: steps a to b - 1 go into one Chrome trace per rank, <run directory>/profile/; empty: none."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that record."""

    def __post_init__(self) -> None:
        if self.steps and (len(self.steps) != 2 or not 1 <= self.steps[0] < self.steps[1]):
            raise ValueError(f"trainer.profile.steps must be two steps [a, b] with 1 <= a < b, got {list(self.steps)}")
        if any(rank < 0 for rank in self.ranks):
            raise ValueError(f"trainer.profile.ranks must not be negative, got {list(self.ranks)}")
