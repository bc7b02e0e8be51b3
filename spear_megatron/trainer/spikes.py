"""The rule for optimizer steps whose gradient norm or loss is far above the usual."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from spear_megatron.trainer.parts import Progress
from spear_megatron.trainer.watch_config import LossSpikeConfig


@dataclass(frozen=True, slots=True)
class Verdict:
    """``text``: what to say, or None; ``apply``: whether the update is made."""

    text: str | None = None
    apply: bool = True
    ratio: float | None = None


class SpikeRule:
    """Judges optimizer steps against the running median of the last ones, which ``progress`` carries over a restart.

    Every rank sees the same figures in the same order, so all come to the same verdict. A spike enters the history
    too: what stays high becomes the usual after half a window, so that a rule that skips cannot lock a run.
    """

    def __init__(self, config: LossSpikeConfig, progress: Progress) -> None:
        self._config = config
        self._progress = progress

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """The verdict on an update with finite loss and gradient norm, which counts in the history."""
        config, progress = self._config, self._progress
        if config.action == "off":
            return Verdict()
        value = norm if config.metric == "grad_norm" else abs(loss)
        history = progress.spike_history
        progress.spike_history = [*history, value][-config.window :]
        if len(history) < max(4, config.window // 4):
            return Verdict()
        median = statistics.median(history)
        ratio = value / median if median > 0 else (math.inf if value > 0 else 1.0)
        if ratio <= config.factor:
            progress.spike_streak = 0
            return Verdict(ratio=ratio)
        progress.spike_streak += 1
        progress.loss_spikes += 1
        if progress.spike_streak < config.patience:
            return Verdict(ratio=ratio)
        text = (
            f"step {step}: {config.metric} {value:.3g} is above {config.factor:g} times its running median "
            f"{median:.3g}, {progress.spike_streak} optimizer steps in a row"
        )
        return Verdict(text if config.action == "warn" else f"{text}; update left out", config.action == "warn", ratio)
