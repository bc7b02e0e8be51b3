"""pass@k and maj@k over k as inline SVG: plain text, styled by the page around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from spear_megatron.evaluation.metrics import Estimate

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 66, 26, 34
_KINDS = ("pass", "maj")
_MIN_GAP = 13.0


def curves(title: str, metrics: Mapping[str, Estimate], strict: Mapping[str, Estimate] | None) -> str:
    """One panel: lines of the normalised verdicts with their intervals as bands, dashed lines of the strict ones.

    Args:
        metrics, strict: estimates by name, such as ``pass@8``.
    """
    sizes = sorted({_size(name) for name in metrics if "@" in name})
    name = f"{escape(title)}: pass@k and maj@k"
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">',
        f'<text class="chart-title" x="{_LEFT}" y="15">{escape(title)}</text>',
        *_axes(sizes),
    ]
    labels: list[tuple[float, str, str]] = []
    for kind in _KINDS:
        points = _points(kind, metrics, sizes)
        if not points:
            continue
        parts.append(_band(kind, points, sizes))
        if strict is not None:
            parts.append(_line(f"{kind} strict", _points(kind, strict, sizes), sizes))
        parts.append(_line(kind, points, sizes))
        parts += [_dot(kind, k, estimate, sizes) for k, estimate in points]
        labels.append((_y(points[-1][1].value), kind, f"{kind}@k"))
    parts += [
        f'<text class="label {kind}" x="{_WIDTH - _RIGHT + 8}" y="{y + 4:.1f}">{text}</text>'
        for y, kind, text in _apart(labels)
    ]
    return "".join([*parts, "</svg>"])


def _points(kind: str, metrics: Mapping[str, Estimate], sizes: Sequence[int]) -> list[tuple[int, Estimate]]:
    return [(k, metrics[f"{kind}@{k}"]) for k in sizes if f"{kind}@{k}" in metrics]


def _size(name: str) -> int:
    return int(name.partition("@")[2])


def _x(k: int, sizes: Sequence[int]) -> float:
    """Position on a logarithmic axis; a single k stands in the middle."""
    room = _WIDTH - _LEFT - _RIGHT
    if len(sizes) < 2:
        return _LEFT + room / 2
    return _LEFT + room * (math.log(k) - math.log(sizes[0])) / (math.log(sizes[-1]) - math.log(sizes[0]))


def _y(value: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1.0 - value)


def _axes(sizes: Sequence[int]) -> list[str]:
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = _y(percent / 100)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{percent}</text>')
    shown = sizes if len(sizes) < 9 else sizes[::2]
    for k in shown:
        x = _x(k, sizes)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{k}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">k samples</text>')
    parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{_TOP - 8}" text-anchor="end">%</text>')
    return parts


def _band(kind: str, points: Sequence[tuple[int, Estimate]], sizes: Sequence[int]) -> str:
    if len(points) == 1:
        k, estimate = points[0]
        x, low, high = _x(k, sizes), _y(estimate.low), _y(estimate.high)
        return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    upper = [f"{_x(k, sizes):.1f},{_y(estimate.high):.1f}" for k, estimate in points]
    lower = [f"{_x(k, sizes):.1f},{_y(estimate.low):.1f}" for k, estimate in reversed(points)]
    return f'<polygon class="band {kind}" points="{" ".join(upper + lower)}"/>'


def _line(css: str, points: Sequence[tuple[int, Estimate]], sizes: Sequence[int]) -> str:
    path = " ".join(f"{_x(k, sizes):.1f},{_y(estimate.value):.1f}" for k, estimate in points)
    return f'<polyline class="{css}" points="{path}"/>'


def _dot(kind: str, k: int, estimate: Estimate, sizes: Sequence[int]) -> str:
    text = f"{kind}@{k}: {estimate.value * 100:.1f} % ({estimate.low * 100:.1f} - {estimate.high * 100:.1f} %)"
    x, y = _x(k, sizes), _y(estimate.value)
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{text}</title></circle>'


def _apart(labels: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels moved down until none covers another, and up again where they would leave the panel."""
    placed: list[tuple[float, str, str]] = []
    for y, kind, text in sorted(labels):
        placed.append((max(y, placed[-1][0] + _MIN_GAP) if placed else y, kind, text))
    over = max(0.0, placed[-1][0] - _y(0.0)) if placed else 0.0
    return [(y - over, kind, text) for y, kind, text in placed]
