"""What the plot of runs shows: which metrics stand together in a panel, and which panels have data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spear_megatron.observability.arms import Arm, arm_curve, metric_names
from spear_megatron.observability.plots import Curve

Style = Literal["solid", "dashed", "dotted", "points"]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a panel.

    Attributes:
        arm: label of its runs. quantity: what it shows. style: ``points`` are markers with their interval as a bar.
        raw: the curve before smoothing, where nothing but one run is shown.
    """

    arm: str
    quantity: str
    curve: Curve
    style: Style
    raw: Curve | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that share their axes.

    Attributes:
        limits: range of the vertical axis, where it is fixed.
        one_arm: all curves are of one arm, though others may stand in the other panels.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    limits: tuple[float, float] | None = None
    one_arm: bool = False


@dataclass(frozen=True, slots=True)
class _Wanted:
    metric: str
    quantity: str
    style: Style = "solid"


def build_panels(arms: Sequence[Arm], smooth: int = 1) -> list[Panel]:
    """The panels that ``arms`` have data for, in the order in which they are shown.

    Schedules and the buffer are left out too where they are zero throughout: they are off.
    """
    sets = [name for name in metric_names(arms, "val/") if name.endswith("success_rate")]
    first = [_Wanted(name, "held-out", "points") for name in sets[:1]]
    success = _panel("Success", "fraction of tasks", [_Wanted("success/mean", "training rollouts"), *first], arms,
                     smooth, (0.0, 1.0))  # fmt: skip
    others = [
        _panel(f"Held-out success: {name.split('/')[1]}", "fraction of tasks", [_Wanted(name, "held-out", "points")],
               arms, smooth, (0.0, 1.0))
        for name in sets[1:]
    ]  # fmt: skip
    reward = [_Wanted("critic/rewards/mean", "mean reward"), _Wanted("replay/p50", "replay baseline P50", "dashed")]
    schedules = [_Wanted("spear/gamma", "γ, self-imitation"), _Wanted("spear/mu", "μ, tool bonus", "dashed")]
    stored = [
        _Wanted("replay/stored", "stored"),
        _Wanted("replay/qualifying", "of positive advantage", "dashed"),
        _Wanted("replay/trigger", "needed to start", "dotted"),
    ]
    covariance = [_Wanted("cov/selected", "on-policy"), _Wanted("cov/replay_selected", "replayed", "dashed")]
    panels = [
        success,
        *others,
        _panel("Reward", "reward", reward, arms, smooth),
        _panel("Entropy of the policy", "nats per token", [_Wanted("actor/entropy", "entropy")], arms, smooth),
        _panel("Tool calls", "calls per trajectory", [_Wanted("tools/calls_mean", "tool calls")], arms, smooth),
        _unless_zero(_panel("Coefficients of the schedules", "coefficient", schedules, arms, 1)),
        _unless_zero(_panel("Replay buffer", "trajectories", stored, arms, 1)),
        *(_flow(arm, len(arms) > 1, smooth) for arm in arms),
        _panel("Tokens selected by covariance", "tokens per optimizer step", covariance, arms, smooth),
    ]
    return [panel for panel in panels if panel is not None and panel.lines]


def _panel(
    title: str,
    unit: str,
    wanted: Sequence[_Wanted],
    arms: Sequence[Arm],
    smooth: int,
    limits: tuple[float, float] | None = None,
) -> Panel:
    lines = []
    for arm in arms:
        for item in wanted:
            width = 1 if item.style == "points" else smooth
            points = arm_curve(arm, item.metric, width)
            raw = arm_curve(arm, item.metric) if width > 1 and len(arms) == len(arm.records) == 1 else None
            if points.steps:
                lines.append(Line(arm.label, item.quantity, points, item.style, raw))
    return Panel(title, unit, tuple(lines), limits)


def _unless_zero(panel: Panel) -> Panel | None:
    return panel if any(any(line.curve.values) for line in panel.lines) else None


def _flow(arm: Arm, named: bool, smooth: int) -> Panel | None:
    """What went in and out of one arm's buffer; quantities that are zero throughout are left out."""
    rejected = [
        _Wanted(name, f"rejected: {name.rpartition('/')[2]}", "dashed")
        for name in metric_names([arm], "replay/rejected/")
    ]
    quantities = ("pushed", "replayed", "expired", "evicted")
    wanted = [*(_Wanted(f"replay/{quantity}", quantity) for quantity in quantities), *rejected]
    title = f"Flow of the replay buffer{f': {arm.label}' if named else ''}"
    panel = _panel(title, "trajectories per step", wanted, [arm], smooth)
    lines = tuple(line for line in panel.lines if any(line.curve.values))
    return Panel(panel.title, panel.unit, lines, one_arm=True) if lines else None
