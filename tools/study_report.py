"""docs/study.md and its figures out of the finished runs. The text claims no more than the intervals show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from study_plan import Study, Task
from study_plots import save_mechanism_figure, save_success_figure
from study_pool import DONE_NAME, record_of

from spear_megatron.evaluation.student import Interval, mean_interval
from spear_megatron.evaluation.study import (
    MECHANISMS,
    SUCCESS,
    Outcome,
    Run,
    area_under,
    common_budget,
    differences,
    outcomes,
    token_curve,
    value_at,
    verdict,
)

INTRODUCTION = """# Comparison of training methods

Written by `tools/study.py` from the records of its runs; do not edit by hand.{notes}

All arms of a task start from the same cold-started model and see the same held-out problems. A run goes on until it
has sampled the same number of tokens in training (evaluation is not counted), and all figures are taken at that budget,
by linear interpolation between evaluations. *Success* is held-out success there, *area* the mean of the success curve
up to it. Intervals are 95 % Student t intervals over seeds; a seed changes the order of the prompts and all sampling,
not the cold start. Differences are paired by seed. *Higher* and *lower* mean that the interval of the difference
excludes 0; the intervals are not corrected for the number of comparisons: of 20 comparisons without any true
difference, one would be expected to show one.
"""
REPRODUCE = """## Reproducing

```
python tools/study.py --tune
python tools/study.py --seeds {seeds} --jobs 2
python tools/study.py --sweep
```

The first command tries the task's learning rates on one seed that the study does not use, the same grid for every
arm, and freezes the best by held-out success. An interrupted command continues when it is given again. The tables and
figures alone: `python tools/study.py --report-only`.
"""


def write_report(
    study: Study, tasks: Sequence[Task], out: Path, docs: Path, frozen: Mapping[str, Mapping[str, float]]
) -> Path:
    """Write ``docs``/study.md and the figures of every task that has finished runs; returns the page's path."""
    notes = f" The section of notes is quoted from `{study.notes.name}`." if study.notes else ""
    parts, seeds = [INTRODUCTION.format(notes=notes), _arms_table(study)], 0
    for task in tasks:
        runs = finished_runs(study, out / task.name / "runs")
        seeds = max([seeds, *(run.seed for run in runs)])
        parts.append(_task_section(study, task, runs, docs, frozen.get(task.name, {})))
        tables = (
            _tuning_table(study, task, out / task.name / "tune"), _sweep_table(study, task, out / task.name / "sweep")
        )  # fmt: skip
        parts += [table for table in tables if table]
    if study.notes is not None:
        parts.append(study.notes.read_text(encoding="utf-8"))
    parts.append(REPRODUCE.format(seeds=max(seeds, 1)))
    docs.mkdir(parents=True, exist_ok=True)
    page = docs / "study.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def finished_runs(study: Study, root: Path) -> list[Run]:
    """Finished runs below ``root``/ARM/seed_N, in the order of the study's arms, then seeds."""
    found = []
    for arm in study.arms:
        folders = [path.parent for path in (root / arm).glob(f"seed_*/{DONE_NAME}")]
        seeds = sorted((int(folder.name.removeprefix("seed_")), folder) for folder in folders)
        found += [Run(arm, seed, record_of(folder)) for seed, folder in seeds]
    return found


def _arms_table(study: Study) -> str:
    lines = ["| arm | preset | on top of it |", "| --- | --- | --- |"]
    for arm in study.arms.values():
        preset = f"`{arm.preset.stem}`" if arm.preset else "none"
        extra = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in arm.overrides.items()) or "nothing"
        lines.append(f"| {arm.title} | {preset} | {extra} |")
    return "\n".join(lines) + "\n"


def _task_section(study: Study, task: Task, runs: Sequence[Run], docs: Path, rates: Mapping[str, float]) -> str:
    heading = f"## {task.title}\n"
    if not runs:
        return f"{heading}\nNo run of this task has finished.\n"
    budget = min(common_budget(runs), task.token_budget)
    found = outcomes(runs, budget)
    start = mean_interval([value_at(token_curve(run.record, SUCCESS), 0.0) for run in runs])
    schedules = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in task.overrides.items())
    facts = [
        heading,
        f"Configuration `configs/{task.config.name}`, budget {budget:,.0f} sampled tokens. For every arm alike: "
        f"{schedules or 'nothing else'}. Success before training: {percent(start)}.",
        "" if budget >= task.token_budget else
        f"The configured budget of {task.token_budget:,.0f} tokens was not reached by every run: the budget here is "
        "the largest that all runs reached.\n",
    ]  # fmt: skip
    titles = {name: study.arms[name].title for name in found}
    images = docs / "images"
    save_success_figure(runs, titles, budget, images / f"study_{task.name}.png", task.title)
    save_mechanism_figure(runs, titles, images / f"study_{task.name}_mechanisms.png", task.title)
    parts = [
        "\n".join(facts),
        _outcome_table(found, titles, rates),
        *(_difference_table(found, titles, baseline) for baseline in study.baselines),
        _mechanism_table(found, titles),
        f"![Held-out success against sampled tokens](images/study_{task.name}.png)\n",
        f"![Mechanisms over the steps](images/study_{task.name}_mechanisms.png)\n",
    ]
    return "\n".join(part for part in parts if part)


def _outcome_table(found: Mapping[str, Outcome], titles: Mapping[str, str], rates: Mapping[str, float]) -> str:
    lines = ["| arm | learning rate | seeds | success | area |", "| --- | --- | --- | --- | --- |"]
    for arm, outcome in found.items():
        rate = f"{rates[arm]:g}" if arm in rates else "of the configuration"
        final, area = mean_interval(list(outcome.final.values())), mean_interval(list(outcome.area.values()))
        lines.append(f"| {titles[arm]} | {rate} | {final.num} | {percent(final)} | {percent(area)} |")
    return "\n".join(lines) + "\n"


def _difference_table(found: Mapping[str, Outcome], titles: Mapping[str, str], baseline: str) -> str:
    """Paired differences in percentage points, with what they show in words."""
    compared = differences(found, baseline)
    if not compared:
        return ""
    lines = [
        f"Against {titles[baseline]}, in percentage points:\n",
        "| arm | seeds | success | shows | area | shows |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for arm, (final, area) in compared.items():
        cells = (titles[arm], str(final.num), points(final), verdict(final), points(area), verdict(area))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mechanism_table(found: Mapping[str, Outcome], titles: Mapping[str, str]) -> str:
    names = [item.name for item in MECHANISMS if any(found[arm].mechanisms[item.name] for arm in found)]
    if not names:
        return ""
    lines = [
        "What the parts of the methods did up to the budget, mean over seeds (*end*: last fifth of the steps; a part "
        "at 0 was inert, a dash is not recorded):\n",
        f"| arm | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}",
    ]  # fmt: skip
    for arm, outcome in found.items():
        cells = [_figure(outcome.mechanisms[name]) for name in names]
        lines.append(f"| {titles[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _tuning_table(study: Study, task: Task, root: Path) -> str:
    """Success and area of every arm at every learning rate of the grid, at the tokens that all these runs reached."""
    folders = {(arm, lr): root / f"{arm}-lr{lr:g}" for arm in study.arms for lr in task.learning_rates}
    runs = {
        key: [Run(key[0], 0, record_of(path.parent)) for path in sorted(folder.glob(f"seed_*/{DONE_NAME}"))]
        for key, folder in folders.items()
    }
    every = [run for part in runs.values() for run in part]
    if not every:
        return ""
    budget = min(common_budget(every), task.token_budget)
    rates = task.learning_rates
    lines = [
        f"The runs that chose the learning rates, success (area) at {budget:,.0f} tokens; their seeds are not those of "
        "the study, and no statement about differences follows from one seed:\n",
        f"| arm | {' | '.join(f'{lr:g}' for lr in rates)} |", f"| --- |{' --- |' * len(rates)}",
    ]  # fmt: skip
    for arm in study.arms:
        cells = []
        for lr in rates:
            curves = [token_curve(run.record, SUCCESS) for run in runs[(arm, lr)]]
            means = [mean_interval([of(curve, budget) for curve in curves]) for of in (value_at, area_under) if curves]
            cells.append(f"{100 * means[0].mean:.1f} % ({100 * means[1].mean:.1f})" if means else "–")
        lines.append(f"| {study.arms[arm].title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_SWEEP_COLUMNS = ("replay/age_mean", "replay/ratio_mean", "replay/ratio_max", "replay/replayed", "cov/selected")


def _sweep_table(study: Study, task: Task, root: Path) -> str:
    """One row per finished variant."""
    runs = []
    for name in study.sweep:
        folders = [path.parent for path in (root / name).glob(f"seed_*/{DONE_NAME}")]
        runs += [Run(name, int(folder.name.removeprefix("seed_")), record_of(folder)) for folder in folders]
    if not runs or study.sweep_arm is None:
        return ""
    lines = [
        f"Variants of {study.arms[study.sweep_arm].title}, one seed each, at the token budget or at the last "
        "evaluation before it (no statement about differences follows from one seed); replay and covariance figures "
        "are means over the steps:\n",
        f"| variant | changes | tokens | success | area | {' | '.join(f'`{name}`' for name in _SWEEP_COLUMNS)} |",
        f"| --- | --- | --- | --- | --- |{' --- |' * len(_SWEEP_COLUMNS)}",
    ]
    for run in runs:
        settings = study.sweep[run.arm].items()
        changes = ", ".join(f"`{key.rpartition('.')[2]}={json.dumps(value)}`" for key, value in settings)
        curve = token_curve(run.record, SUCCESS)
        budget = min(curve.reach, task.token_budget)
        final, area = (f"{100 * value:.1f} %" for value in (value_at(curve, budget), area_under(curve, budget)))
        columns = [_figure(_mean_of(run, name)) for name in _SWEEP_COLUMNS]
        cells = [run.arm, changes or "none", f"{budget:,.0f}", final, area, *columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_of(run: Run, metric: str) -> Interval | None:
    values = token_curve(run.record, metric).values
    return mean_interval(values) if values else None


def percent(interval: Interval) -> str:
    """A share in percent with its interval, where there is one."""
    return _with_span(interval, "{:.1f}", 100.0) + " %"


def points(interval: Interval) -> str:
    """A difference of shares in percentage points with its interval."""
    return _with_span(interval, "{:+.1f}", 100.0)


def _with_span(interval: Interval, form: str, scale: float) -> str:
    mean, low, high = (form.format(scale * value) for value in (interval.mean, interval.low, interval.high))
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def _figure(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.mean:.3g}"
