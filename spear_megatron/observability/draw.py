"""Panels as one PNG for readers, and as lines of text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spear_megatron.observability.arms import Arm
from spear_megatron.observability.files import named_errors
from spear_megatron.observability.panels import Line, Panel
from spear_megatron.observability.plots import Curve, text_chart

# Okabe and Ito (2008): told apart with every kind of colour vision, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = {"solid": "-", "dashed": (0, (4, 1.5)), "dotted": (0, (1, 1.5)), "points": "none"}
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 2
_LEGEND_COLUMNS = 3
_LEGEND_WIDTH = 110  # characters that fit side by side below the panels


def save_panels(
    panels: Sequence[Panel], arms: Sequence[Arm], path: str | Path, title: str = "", smooth: int = 1
) -> Path:
    """Draw ``panels`` into the PNG ``path``, 1200 pixels wide, and return it.

    With several arms the colour tells the arm and the dashes the quantity; with one the colour tells the quantity.
    ``smooth`` is the number of steps that ``panels`` were averaged over, for the heading.

    Raises:
        ValueError: there is no panel, or matplotlib is not installed.
    """
    if not panels:
        raise ValueError(f"there is nothing to draw into {path}: the record has none of the metrics that are plotted")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ValueError("drawing needs matplotlib; run 'pip install matplotlib'") from error
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.02, wspace=0.02)
    figure = Figure(figsize=(10, 2.75 * rows + 0.7), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    labels = [arm.label for arm in arms]
    last = max(line.curve.steps[-1] for panel in panels for line in panel.lines)
    for axes, panel in zip(grid, panels):
        _draw_panel(axes, panel, labels, last)
    for axes in grid[len(panels) :]:
        axes.remove()
    _head(figure, arms, title, smooth)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path):
        figure.savefig(path, dpi=120)
    return path


def curves_note(arms: Sequence[Arm], smooth: int = 1) -> str:
    """What the lines, bands and bars of the plot mean."""
    seeds = sorted({len(arm.records) for arm in arms})
    parts = []
    if seeds[-1] > 1:
        count = str(seeds[-1]) if seeds[0] in (1, seeds[-1]) else f"{seeds[0]} to {seeds[-1]}"
        parts.append(f"mean and range of {count} seeds")
    if seeds[0] == 1:
        parts.append("95 % intervals of single runs" if seeds[-1] > 1 else "95 % intervals")
    if smooth > 1:
        parts.append(f"averages over {smooth} steps")
    return ", ".join(parts)


def _head(figure: Any, arms: Sequence[Arm], title: str, smooth: int) -> None:
    """Title, meaning of the bands, and with several arms their colours."""
    from matplotlib.lines import Line2D

    heading = title or (arms[0].label if len(arms) == 1 else "")
    note = curves_note(arms, smooth)
    figure.suptitle(f"{heading}  ·  {note}" if heading else note, fontsize=10, x=0.015, ha="left", color="#444444")
    if len(arms) > 1:
        handles = [Line2D([], [], color=_colour(index), linewidth=2.5) for index in range(len(arms))]
        names = [f"{arm.label}, {len(arm.records)} seeds" if len(arm.records) > 1 else arm.label for arm in arms]
        columns = max(_LEGEND_WIDTH // (max(map(len, names)) + 6), 1)  # 6: the sample and the gap
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _draw_panel(axes: Any, panel: Panel, arms: Sequence[str], last_step: int) -> None:
    from matplotlib.ticker import MaxNLocator

    quantities = list(dict.fromkeys(line.quantity for line in panel.lines))
    by_arm = len(arms) > 1 and not panel.one_arm
    for line in panel.lines:
        colour = _colour(arms.index(line.arm) if by_arm else quantities.index(line.quantity))
        _draw_line(axes, line, colour)
    legend_rows = math.ceil(len(quantities) / _LEGEND_COLUMNS) if len(quantities) > 1 else 0
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=6 + 13 * legend_rows)
    axes.set_xlabel("training step", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.set_xlim(0, last_step * 1.01 + 0.5)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    if panel.limits is not None:
        axes.set_ylim(panel.limits[0] - 0.03, panel.limits[1] + 0.03)
    elif all(min(line.curve.values) >= 0 for line in panel.lines):
        axes.set_ylim(bottom=0)
    if len(quantities) > 1:
        _legend(axes, panel, quantities, by_arm)


def _legend(axes: Any, panel: Panel, quantities: Sequence[str], by_arm: bool) -> None:
    """Quantities between title and axes, where they hide no data."""
    from matplotlib.lines import Line2D

    styles = {line.quantity: line.style for line in panel.lines}
    handles = [
        Line2D(
            [], [], color="#555555" if by_arm else _colour(index), linestyle=_LINES[styles[name]], linewidth=1.8,
            marker="o" if styles[name] == "points" else None, markersize=4,
        )
        for index, name in enumerate(quantities)
    ]  # fmt: skip
    legend = axes.legend(
        handles, quantities, loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=_LEGEND_COLUMNS, frameon=False,
        fontsize=8, handlelength=1.9, columnspacing=1.2, handletextpad=0.5, labelspacing=0.2, borderaxespad=0.0,
    )  # fmt: skip
    legend.set_in_layout(False)  # its room is the pad of the title; else wide ones would narrow every panel


def _draw_line(axes: Any, line: Line, colour: str) -> None:
    points = line.curve
    if line.style == "points":
        bars = None
        if points.low:
            below = [max(value - low, 0.0) for value, low in zip(points.values, points.low)]
            bars = [below, [max(high - value, 0.0) for value, high in zip(points.values, points.high)]]
        axes.errorbar(
            points.steps, points.values, yerr=bars, fmt="o", color=colour, markersize=4.5, capsize=2, elinewidth=1.1,
            markeredgecolor="white", markeredgewidth=0.6, zorder=4,
        )  # fmt: skip
        return
    if points.low:
        axes.fill_between(points.steps, points.low, points.high, color=colour, alpha=0.16, linewidth=0)
    if line.raw is not None:
        axes.plot(line.raw.steps, line.raw.values, color=colour, alpha=0.25, linewidth=0.9)
    marker = "o" if len(points.steps) == 1 else None
    axes.plot(points.steps, points.values, color=colour, linestyle=_LINES[line.style], linewidth=1.8, marker=marker)


def panels_text(panels: Sequence[Panel], arms: Sequence[Arm], width: int = 40) -> str:
    """Every curve as one line: its first value, its course in blocks, its last value and its range.

    The success of a single arm comes first, as a chart.
    """
    blocks = []
    if panels and len(arms) == 1 and panels[0].limits is not None:
        shown = panels[0].lines[0]
        blocks.append(text_chart(shown.curve, f"{panels[0].title}: {shown.quantity}", limits=panels[0].limits))
    for panel in panels:
        alone = len(arms) == 1 or panel.one_arm
        names = [line.quantity if alone else f"{line.arm}: {line.quantity}" for line in panel.lines]
        margin = max(map(len, names))
        rows = [f"{panel.title} ({panel.unit})"]
        for name, line in zip(names, panel.lines):
            values = line.curve.values
            course = sparkline(line.curve, width, panel.limits)
            span = f"{min(values):.3g} to {max(values):.3g}, steps {line.curve.steps[0]}-{line.curve.steps[-1]}"
            rows.append(f"  {name:<{margin}}  {values[0]:>8.3g} {course:<{width}} {values[-1]:<8.3g}  {span}")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def sparkline(points: Curve, width: int, limits: tuple[float, float] | None = None) -> str:
    """The curve as at most ``width`` blocks of eight heights, each the mean of its share of the values."""
    count = len(points.values)
    edges = [index * count // min(width, count) for index in range(min(width, count) + 1)]
    means = [sum(points.values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, high = limits or (min(means), max(means))
    if high <= low:
        return _BARS[0] * len(means)
    scale = len(_BARS) - 1
    return "".join(_BARS[min(max(round((value - low) / (high - low) * scale), 0), scale)] for value in means)
