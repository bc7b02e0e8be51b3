"""Figures of the study: success against sampled tokens with a band over seeds, and what the mechanisms did."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spear_megatron.evaluation.student import mean_interval
from spear_megatron.evaluation.study import SUCCESS, Run, band_on_grid, token_curve

# Okabe and Ito (2008): told apart with every kind of colour vision.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
PANELS = (
    ("entropy (nats)", "actor/entropy"), ("tool calls per trajectory", "tools/calls_mean"),
    ("success of the training rollouts", "success/mean"), ("coefficient of self-imitation", "spear/gamma"),
    ("coefficient of the tool bonus", "spear/mu"), ("replayed trajectories", "replay/replayed"),
    ("replayed share of tokens", "replay/token_share"), ("covariance tokens selected", "cov/selected"),
)  # fmt: skip


def save_success_figure(
    runs: Sequence[Run], titles: Mapping[str, str], budget: float, path: Path, title: str
) -> None:
    """Mean held-out success of every arm with its 95 % band over seeds, and thin lines of the single runs.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure, axes = _figure(1, 1, (9.0, 5.2))
    ax = axes[0]
    for colour, arm in zip(COLOURS, titles):
        curves = [token_curve(run.record, SUCCESS) for run in runs if run.arm == arm]
        band = band_on_grid(curves, budget)
        x = [tokens / 1e3 for tokens, _ in band]
        ax.plot(x, [100 * part.mean for _, part in band], color=colour, linewidth=2, label=titles[arm])
        if len(curves) > 1:
            low, high = [100 * part.low for _, part in band], [100 * part.high for _, part in band]
            ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            for curve in curves:
                tokens, values = [t / 1e3 for t in curve.tokens], [100 * v for v in curve.values]
                ax.plot(tokens, values, color=colour, alpha=0.25, linewidth=0.8)
    ax.set(xlabel="sampled tokens (thousands)", ylabel="held-out success (%)", xlim=(0, budget / 1e3), ylim=(0, 100))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    figure.suptitle(f"{title}: mean over seeds, band = 95 % interval")
    _save(figure, path)


def save_mechanism_figure(runs: Sequence[Run], titles: Mapping[str, str], path: Path, title: str) -> None:
    """Mean over seeds of every mechanism's metric against the step; panels without data are left out.

    Raises:
        ValueError: matplotlib is not installed.
    """
    recorded = {name for run in runs for line in run.record for name in line}
    panels = [(label, metric) for label, metric in PANELS if metric in recorded]
    columns = 2
    rows = max(1, math.ceil(len(panels) / columns))
    figure, axes = _figure(rows, columns, (10.0, 2.7 * rows + 0.6))
    for ax, (label, metric) in zip(axes, panels):
        for colour, arm in zip(COLOURS, titles):
            by_step: dict[int, list[float]] = defaultdict(list)
            for run in runs:
                for line in run.record if run.arm == arm else ():
                    if line.get(metric) is not None and line["step"] > 0:
                        by_step[line["step"]].append(float(line[metric]))
            steps = sorted(by_step)
            means = [mean_interval(by_step[step]).mean for step in steps]
            if steps:
                ax.plot(steps, means, color=colour, linewidth=1.5, label=titles[arm])
        ax.set(xlabel="step", ylabel=label)
        ax.grid(alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.remove()
    if panels:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(f"{title}: mean over seeds")
    _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib; run 'pip install matplotlib'") from error
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
