"""One compact line per step and a progress bar; plain lines where the output is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("success/mean", "success", _percent),
    ("critic/rewards/mean", "reward", "{:+.2f}".format),
    ("actor/entropy", "entropy", "{:.3f}".format),
    ("sft/loss", "loss", "{:.4f}".format),
    ("actor/pg_loss", "pg_loss", "{:+.4f}".format),
    ("actor/grad_norm", "grad", "{:.3g}".format),
    ("response_length/mean", "tokens", "{:.0f}".format),
    ("num_turns/mean", "turns", "{:.1f}".format),
    ("tools/calls_mean", "calls", "{:.1f}".format),
    ("training/rollout_logp_abs_diff/mean", "drift", "{:.1e}".format),
    ("timing_s/step", "s", "{:.1f}".format),
    ("perf/throughput", "tok/s", "{:.0f}".format),
)


def _why_idle(metrics: Mapping[str, float]) -> str:
    names = ("overlong", "incomplete", "repetitive", "unreadable")
    shares = {name: metrics.get(f"filter/{name}", 0.0) for name in names}
    told = [f"{_percent(share)} of the trajectories {name}" for name, share in shares.items() if share > 0]
    return ", ".join(told) or "nothing to train on"


def step_line(step: int, metrics: Mapping[str, float]) -> str:
    """The figures that one looks at every step, in one line; validation success rates at the end."""
    parts = [f"{label} {show(metrics[name])}" for name, label, show in _COLUMNS if name in metrics]
    if metrics.get("training/num_optimizer_steps") == 0:
        parts.append("no update: " + _why_idle(metrics))
    if metrics.get("stop/infrastructure", 0.0) > 0:
        parts.append(f"lost to failures {_percent(metrics['stop/infrastructure'])}")
    for name in sorted(metrics):
        if name.startswith("val/") and name.endswith("/success_rate"):
            parts.append(f"{name} {_percent(metrics[name])}")
    return f"step {step:>4}  " + "  ".join(parts)


class ConsoleLog:
    """Shows steps as they come. The progress bar lives below the lines, only on a terminal."""

    def __init__(
        self, total_steps: int | None, last_step: int, console: Console | None = None, every: int = 1
    ) -> None:
        self._every, self._total_steps = every, total_steps
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._task = self._progress.add_task("training", total=total_steps, completed=max(last_step, 0))
            self._progress.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of every ``every``-th step and of the last one, and move the bar to ``step``."""
        if step % self._every == 0 or step in (1, self._total_steps):
            self.message(step_line(step, metrics))
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def message(self, text: str) -> None:
        """Print ``text`` as it is: no markup, no wrapping."""
        self._console.print(Text(text), soft_wrap=True)
        self._console.file.flush()

    def close(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
