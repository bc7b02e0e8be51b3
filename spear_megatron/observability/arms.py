"""Runs as curves: runs that differ by their seed alone form one curve, with a band over the seeds."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spear_megatron.observability.plots import Curve, curve
from spear_megatron.observability.record import read_record
from spear_megatron.observability.trends import Record

_SEED_FOLDER = re.compile(r"seed[-_]?\d+|s\d+", re.IGNORECASE)
_SEED_SUFFIX = re.compile(r"[-_.](?:seed[-_]?\d+|s\d+)\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Arm:
    """The records of one curve, one per seed."""

    label: str
    records: tuple[Record, ...]


def load_arms(run_dirs: Sequence[str | Path], labels: Sequence[str] = ()) -> list[Arm]:
    """Read the records of ``run_dirs`` and put the seeds of one run together, in the order given.

    Args:
        labels: one per folder, if any; folders of one label form one curve. Without them ``NAME/seed_3`` and
            ``NAME-s3`` belong to ``NAME``.

    Raises:
        ValueError: labels and folders differ in number, or a record holds no step or is damaged.
        FileNotFoundError: a folder has no record.
    """
    if labels and len(labels) != len(run_dirs):
        raise ValueError(f"{len(labels)} --label for {len(run_dirs)} run directories: give one to each, in their order")
    names = list(labels) or arm_names([Path(run_dir) for run_dir in run_dirs])
    records: dict[str, list[Record]] = {}
    for run_dir, name in zip(run_dirs, names):
        record = read_record(run_dir)
        if not record:
            raise ValueError(f"{run_dir} holds no steps yet: there is nothing to draw")
        records.setdefault(name, []).append(record)
    return [Arm(name, tuple(members)) for name, members in records.items()]


def arm_names(paths: Sequence[Path]) -> list[str]:
    """Per run directory the name of its curve: without the seed, and as short as tells different runs apart."""
    stems = [_stem(path) for path in paths]
    depth = {stem: 1 for stem in stems}
    while True:
        names = {stem: "/".join(stem.parts[-depth[stem] :]) for stem in depth}
        alike = [stem for stem in names if list(names.values()).count(names[stem]) > 1]
        if not alike:
            return [names[stem] for stem in stems]
        for stem in alike:
            depth[stem] += 1


def _stem(path: Path) -> Path:
    path = Path(os.path.realpath(path))  # Path.resolve() raises on a link that leads back to itself
    if _SEED_FOLDER.fullmatch(path.name):
        return path.parent
    return path.with_name(_SEED_SUFFIX.sub("", path.name))


def arm_curve(arm: Arm, name: str, smooth: int = 1) -> Curve:
    """Metric ``name`` of an arm: a single run with its own interval; of several seeds the mean and their range.

    The mean is over the seeds that have the metric at a step, up to the last step that every seed has reached: a seed
    that stopped early would shift it. ``smooth`` averages each seed over its last so many values first.
    """
    curves = [smoothed(curve(record, name), smooth) for record in arm.records]
    if len(curves) == 1:
        return curves[0]
    reached = min(int(record[-1]["step"]) for record in arm.records)
    values: dict[int, list[float]] = {}
    for points in curves:
        for step, value in zip(points.steps, points.values):
            if step <= reached:
                values.setdefault(step, []).append(value)
    steps = sorted(values)
    columns = [values[step] for step in steps]
    means = [sum(column) / len(column) for column in columns]
    return Curve(steps, means, [min(column) for column in columns], [max(column) for column in columns])


def smoothed(points: Curve, width: int) -> Curve:
    """Each value replaced by the mean of the last ``width`` up to it; the interval, of single values, is dropped."""
    if width <= 1:
        return points
    windows = [points.values[max(0, end - width) : end] for end in range(1, len(points.values) + 1)]
    return Curve(points.steps, [sum(window) / len(window) for window in windows], [], [])


def metric_names(arms: Sequence[Arm], prefix: str) -> list[str]:
    """Metrics of the arms whose name starts with ``prefix``, sorted."""
    lines: list[Mapping[str, object]] = [line for arm in arms for record in arm.records for line in record]
    return sorted({name for line in lines for name in line if name.startswith(prefix)})
