"""The learning curve of a run, as a PNG and as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spear_megatron.observability.files import named_errors
from spear_megatron.observability.intervals import wilson_interval


class Curve(NamedTuple):
    """One metric over the steps; ``low`` and ``high`` bound its 95 % band where there is one, else they are empty."""

    steps: list[int]
    values: list[float]
    low: list[float]
    high: list[float]


def curve(record: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Metric ``name`` at the steps that have it as a finite number.

    ``success/mean`` gets a Wilson interval over ``training/num_trajectories`` (trajectories taken as independent),
    ``val/.../success_rate`` the interval recorded with it.
    """
    result = Curve([], [], [], [])
    for line in record:
        value = line.get(name)
        if value is None:
            continue
        result.steps.append(int(line["step"]))
        result.values.append(float(value))
        band = _band(line, name, float(value))
        if band is not None:
            result.low.append(band[0])
            result.high.append(band[1])
    if len(result.low) != len(result.values):  # a band with holes misleads
        return Curve(result.steps, result.values, [], [])
    return result


def _band(line: Mapping[str, Any], name: str, value: float) -> tuple[float, float] | None:
    if name == "success/mean" and line.get("training/num_trajectories"):
        return wilson_interval(value, float(line["training/num_trajectories"]))
    low, high = line.get(f"{name}_low"), line.get(f"{name}_high")
    return None if low is None or high is None else (float(low), float(high))


def held_out_names(record: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the held-out success rates in ``record``, sorted."""
    names = {name for line in record for name in line}
    return sorted(name for name in names if name.startswith("val/") and name.endswith("success_rate"))


def save_learning_curve(record: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """Draw success, reward, entropy and lengths over the steps into the PNG ``path`` and return it.

    Raises:
        ValueError: the record is empty, or matplotlib is not installed.
    """
    if not record:
        raise ValueError(f"there is nothing to draw into {path}: the record holds no steps")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ValueError("drawing needs matplotlib; run 'pip install matplotlib'") from error
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("success", ["success/mean", *held_out_names(record)]),
        ("reward", ["critic/rewards/mean", "critic/score/mean"]),
        ("entropy (nats)", ["actor/entropy"]),
        ("response tokens", ["response_length/mean", "response_length/max"]),
    )
    for axes, (label, names) in zip(figure.subplots(2, 2).flat, panels):
        for name in names:
            _draw(axes, curve(record, name), name)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if label == "success":
            axes.set_ylim(-0.02, 1.02)
        if axes.lines:
            axes.legend(fontsize=8)
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path):
        figure.savefig(path, dpi=120)
    return path


def _draw(axes: Any, points: Curve, name: str) -> None:
    if not points.steps:
        return
    marker = "o" if name.startswith("val/") or len(points.steps) == 1 else None
    (line,) = axes.plot(points.steps, points.values, marker=marker, label=name)
    if points.low:
        axes.fill_between(points.steps, points.low, points.high, alpha=0.2, color=line.get_color(), linewidth=0)


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BRAILLE = 0x2800


def text_chart(
    points: Curve, title: str, width: int = 60, height: int = 10, limits: tuple[float, float] | None = None
) -> str:
    """The curve in braille dots, ``width`` x ``height`` characters inside the frame, with both axes labelled.

    Args:
        limits: range of the vertical axis; that of the values if None.
    """
    if not points.steps:
        return f"{title}: no values"
    low, high = limits or (min(points.values), max(points.values))
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    grid = [[0] * width for _ in range(height)]
    dots = _dots(points, low, high, 2 * width, 4 * height)
    for x, y in dots:
        grid[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    labels = {0: f"{high:.3g}", height // 2: f"{(low + high) / 2:.3g}", height - 1: f"{low:.3g}"}
    margin = max(map(len, labels.values()))
    drawn = ("".join(chr(_BRAILLE + cell) for cell in row) for row in grid)
    rows = [f"{labels.get(index, ''):>{margin}} ┤{row}" for index, row in enumerate(drawn)]
    first, last = str(points.steps[0]), str(points.steps[-1])
    axis = f"{'':>{margin}} └{'─' * width}"
    foot = f"{'':>{margin}}  {first}{'step':^{max(width - len(first) - len(last), 0)}}{last}"
    return "\n".join([title, *rows, axis, foot])


def _dots(points: Curve, low: float, high: float, columns: int, rows: int) -> list[tuple[int, int]]:
    """Dots (x, y from the top) of the curve, neighbours joined by a straight line."""
    first, span = points.steps[0], max(points.steps[-1] - points.steps[0], 1)
    place = [
        (
            round((step - first) / span * (columns - 1)),
            round((1 - min(max((value - low) / (high - low), 0.0), 1.0)) * (rows - 1)),
        )
        for step, value in zip(points.steps, points.values)
    ]
    dots = place[:1]
    for (x0, y0), (x1, y1) in zip(place, place[1:]):
        count = max(abs(x1 - x0), abs(y1 - y0), 1)
        dots += [(round(x0 + (x1 - x0) * i / count), round(y0 + (y1 - y0) * i / count)) for i in range(1, count + 1)]
    return dots
