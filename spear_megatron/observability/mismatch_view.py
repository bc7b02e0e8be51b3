"""The mismatch of engine and trainer for readers: a table for the terminal, a picture of the single tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spear_megatron.observability.files import named_errors

Figures = Mapping[str, Mapping[str, float]]
"""Figures by bucket: tokens, abs_diff_mean, abs_diff_max, k3, over_bound."""

_HEADINGS = {"turn": "turn", "position": "position", "lag": "versions behind"}
_MAX_POINTS = 20000


def print_mismatch(engine: Figures, saved_engine: Figures, saved: Figures) -> None:
    """Print one line per bucket.

    Args:
        engine: trainer now against engine. saved_engine: trainer then against engine. saved: trainer now against then;
            the last two are empty where the trainer's log-probs were not saved.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="|log-prob difference| in nats, mean (largest)")
    columns = ("bucket", "tokens", "trainer now - engine", "k3", "over bound", "trainer then - engine", "now - then")
    for name in columns:
        table.add_column(name, justify="left" if name == "bucket" else "right", no_wrap=True)
    before = "all"
    for name, values in engine.items():
        kind = name.partition("_")[0]
        if kind != before:
            table.add_section()
        before = kind
        table.add_row(
            _label(name), f"{values['tokens']:.0f}", _sizes(engine, name), f"{values['k3']:.3g}",
            f"{values['over_bound']:.1%}", _sizes(saved_engine, name), _sizes(saved, name),
        )  # fmt: skip
    Console(highlight=False, width=120).print(table)


def _label(name: str) -> str:
    kind, _, bucket = name.partition("_")
    return f"{_HEADINGS[kind]} {bucket.replace('plus', '+')}" if bucket else "all"


def _sizes(figures: Figures, name: str) -> str:
    if name not in figures:
        return "-"
    return f"{figures[name]['abs_diff_mean']:.3g} ({figures[name]['abs_diff_max']:.3g})"


def save_mismatch_plot(
    path: Path, turns: Sequence[int], positions: Sequence[int], differences: Sequence[float], title: str = ""
) -> Path:
    """Draw the differences of single tokens into a PNG: over their position, coloured by turn, and as a histogram.

    Args:
        turns, positions: 1-based. differences: trainer's minus engine's log-prob, nats; those not finite are left out.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib; run 'pip install matplotlib'") from error
    tokens = [t for t in zip(turns, positions, differences, strict=True) if abs(t[2]) < float("inf")]
    # So many points are told apart by no eye; every n-th keeps the shape.
    tokens = tokens[:: len(tokens) // _MAX_POINTS + 1]
    figure = Figure(figsize=(11, 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    over_position, histogram = figure.subplots(1, 2)
    for turn in sorted({min(turn, 9) for turn, _, _ in tokens}):
        chosen = [(position, value) for number, position, value in tokens if min(number, 9) == turn]
        label, colour = f"turn {turn}{'+' if turn == 9 else ''}", f"C{turn - 1}"
        values = [value for _, value in chosen]
        over_position.scatter([position for position, _ in chosen], values, s=6, alpha=0.5, color=colour, label=label)
        histogram.hist(values, bins=_bins(tokens), histtype="step", color=colour, label=label)
    over_position.set(xlabel="position after the prompt", ylabel="trainer - engine, nats")
    histogram.set(xlabel="trainer - engine, nats", ylabel="tokens", yscale="log" if tokens else "linear")
    for axes in (over_position, histogram):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path):
        figure.savefig(path, dpi=120)
    return path


def _bins(tokens: Sequence[tuple[int, int, float]]) -> Any:
    reach = max((abs(value) for _, _, value in tokens), default=0.0) or 1e-9
    return [reach * (index - 30) / 30 for index in range(61)]
