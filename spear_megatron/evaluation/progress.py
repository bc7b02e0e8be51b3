"""How far an evaluation is: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spear_megatron.evaluation.samples import Sample

_EVERY_S = 30.0


class EvaluationProgress:
    """Shows the samples of one leader as they come.

    Args:
        total: samples to take.
        shown: whether this rank shows anything.
    """

    def __init__(self, total: int, *, shown: bool = True, console: Console | None = None) -> None:
        self._total, self._shown = total, shown
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._start = self._told = time.monotonic()
        self.num_samples = self.num_correct = self.num_failed = self.num_tokens = 0
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._task = self._bar.add_task("evaluating", total=total)
            self._bar.start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def add(self, sample: Sample) -> None:
        """Count a finished sample."""
        self.num_samples += 1
        self.num_correct += sample.correct
        self.num_failed += not sample.valid
        self.num_tokens += sample.num_sampled_tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.num_samples, description=self._text())
        elif self._shown and time.monotonic() - self._told > _EVERY_S:
            self._told = time.monotonic()
            self._console.print(f"{self.num_samples} of {self._total} samples, {self._text()}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _text(self) -> str:
        valid = max(1, self.num_samples - self.num_failed)
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        rate = self.num_tokens / max(self.seconds, 1e-9)
        return f"{100 * self.num_correct / valid:.1f} % right, {rate:.0f} tokens/s{failed}"
